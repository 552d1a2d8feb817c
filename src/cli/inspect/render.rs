//! The report of `inspect` as text.

use std::fmt::Write;

use ramwire::units::PageSize;

use super::super::common::human_bytes;
use super::report::{Block, DeviceState, End, Pages, Report, Row};

/// The whole report. Offsets and lengths are bytes.
pub(super) fn text(report: &Report) -> String {
    let mut out = String::new();
    head(report, &mut out);
    items(&report.items, &mut out);
    blocks(&report.blocks, &report.pages, &mut out);
    if let Some(state) = &report.device_state {
        devices(state, &mut out);
    }
    if report.anomalies.is_empty() {
        line(&mut out, format_args!("\nnothing unusual"));
    } else {
        line(&mut out, format_args!("\nunusual"));
        for anomaly in &report.anomalies {
            line(&mut out, format_args!("  {:>#12x}  {}", anomaly.at, anomaly.what));
        }
    }
    out
}

/// A name from the stream, fit for a terminal.
fn printable(name: &str) -> String {
    name.escape_debug().to_string()
}

/// Writing to a string does not fail.
fn line(out: &mut String, args: std::fmt::Arguments<'_>) {
    let _ = writeln!(out, "{args}");
}

fn head(report: &Report, out: &mut String) {
    let end = match report.end {
        End::Whole => "whole",
        End::NoDescription => "perhaps whole: it has no VM description",
        End::Truncated => "cut off",
        End::Damaged => "damaged",
    };
    let machine = report.machine.as_deref().unwrap_or("?");
    let pages = PageSize::from_bytes(report.page_size).map_or_else(String::new, |page| page.to_string());
    line(out, format_args!("machine {machine:?}, {pages} pages, {} bytes, {end}", report.bytes));
    match (report.configuration, report.footers) {
        (true, true) => {}
        (false, true) => line(out, format_args!("without configuration section")),
        (true, false) => line(out, format_args!("without section footers")),
        (false, false) => line(out, format_args!("without configuration section and section footers")),
    }
    if !report.capabilities.is_empty() {
        line(out, format_args!("capabilities: {}", report.capabilities.join(", ")));
    }
    if let Some(uuid) = &report.uuid {
        line(out, format_args!("uuid: {uuid}"));
    }
    if let Some(snapshot) = &report.snapshot {
        match &snapshot.base {
            None => line(out, format_args!("snapshot: {}", snapshot.id)),
            Some((id, file)) => {
                let file = printable(file);
                line(out, format_args!("snapshot: {}, the changes since {id} in {file}", snapshot.id));
            }
        }
        if let Some(why) = &snapshot.unusable {
            line(out, format_args!("it can't be read here: {why}"));
        }
    }
    if let Some(style) = &report.style {
        line(out, format_args!("sender: {style}"));
    }
}

fn items(rows: &[Row], out: &mut String) {
    line(out, format_args!("\n{:>14} {:>12}  item", "offset", "bytes"));
    for row in rows {
        let times = if row.count > 1 { format!(" x {}", row.count) } else { String::new() };
        line(out, format_args!("{:>#14x} {:>12}  {}{times}", row.at, row.bytes, row.what));
    }
}

fn blocks(blocks: &[Block], total: &Pages, out: &mut String) {
    if blocks.is_empty() {
        return;
    }
    let width = blocks
        .iter()
        .map(|block| printable(&block.name).chars().count())
        .max()
        .unwrap_or(0)
        .max("all pages".len());
    line(
        out,
        format_args!(
            "\n{:width$} {:>12} {:>9} {:>9} {:>9} {:>10}",
            "block", "length", "whole", "zero", "xbzrle", "compressed"
        ),
    );
    for block in blocks {
        let length = human_bytes(block.length);
        line(
            out,
            format_args!("{:width$} {length:>12} {}{}", block.name, pages(&block.pages), extras(block)),
        );
    }
    line(out, format_args!("{:width$} {:>12} {}", "all pages", "", pages(total)));
}

fn pages(pages: &Pages) -> String {
    format!(
        "{:>9} {:>9} {:>9} {:>10}",
        pages.whole,
        pages.zero + pages.filled,
        pages.xbzrle,
        pages.compressed
    )
}

fn extras(block: &Block) -> String {
    let mut text = String::new();
    if let Some(page) = block.host_page {
        text.push_str(&format!("  {} host pages", human_bytes(page)));
    }
    if let Some(addr) = block.guest_addr {
        text.push_str(&format!("  at guest address {addr:#x}"));
    }
    if let Some(at) = block.pages_at {
        text.push_str(&format!("  pages at {at:#x} of the file"));
    }
    if let (Some(present), Some(holes)) = (block.pages_present, block.holes) {
        text.push_str(&format!(": {present} pages in the file, {holes} holes"));
    }
    text
}

fn devices(state: &DeviceState, out: &mut String) {
    let how = if state.exact { "" } else { ", not all of it could be cut into sections" };
    line(out, format_args!("\ndevice state: {} bytes at {:#x}{how}", state.bytes, state.at));
    for device in &state.sections {
        let instance = if device.instance > 0 { format!(" #{}", device.instance) } else { String::new() };
        line(
            out,
            format_args!(
                "{:>14}  {}{instance} (version {}, id {})",
                device.bytes,
                printable(&device.name),
                device.version,
                device.section_id
            ),
        );
    }
}
