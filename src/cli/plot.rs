//! Charts as SVG text, drawn by `plotters`: lines over linear or logarithmic axes, bars with intervals, bars across, and
//! groups of bars.

use std::ops::Range;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

/// Height of labels in pixels.
const LABEL: u32 = 14;
/// Room next to the axes for their labels, in pixels.
const LEFT: u32 = 80;
const BELOW: u32 = 48;

/// Colours that people with impaired colour vision can distinguish, too.
const COLORS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
];

fn color(index: usize) -> RGBColor {
    COLORS[index % COLORS.len()]
}

/// The canvas of a chart.
#[derive(Clone, Debug)]
pub(super) struct Canvas {
    /// Width and height in pixels.
    pub(super) size: (u32, u32),
    /// Whether a chart of several lines has a legend; otherwise its surroundings name them.
    pub(super) legend: bool,
    /// A shaded part of the x axis.
    pub(super) band: Option<Range<f64>>,
    /// Maximum number of ticks of the x axis; `None`: as many as fit.
    pub(super) ticks: Option<usize>,
    /// The y axis extends at least this far.
    pub(super) up_to: f64,
}

impl Default for Canvas {
    fn default() -> Self {
        Self { size: (900, 480), legend: true, band: None, ticks: None, up_to: 0.0 }
    }
}

impl Canvas {
    /// How many labels of 100 pixels fit below the chart.
    fn labels_across(&self) -> usize {
        self.ticks.unwrap_or((self.size.0.saturating_sub(LEFT) / 100).max(2) as usize)
    }

    /// How many labels fit next to the chart.
    fn labels_up(&self) -> usize {
        (self.size.1.saturating_sub(BELOW) / 45).max(2) as usize
    }
}

/// `svg` in the colours of its page, on the page's own background: `--ink` and `--c0` to `--c5` of the page's style.
pub(super) fn themed(svg: &str) -> String {
    let hex = |color: RGBColor| format!("\"#{:02X}{:02X}{:02X}\"", color.0, color.1, color.2);
    let mut out = svg.replace(&hex(BLACK), "\"var(--ink)\"").replace(&hex(WHITE), "\"none\"");
    for (index, color) in COLORS.iter().enumerate() {
        out = out.replace(&hex(*color), &format!("\"var(--c{index})\""));
    }
    out
}

/// A chart that could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("drawing a chart: {0}")]
pub(super) struct PlotError(String);

fn failed(error: impl std::fmt::Display) -> PlotError {
    PlotError(error.to_string())
}

/// One axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis<'a> {
    /// The quantity, with its unit.
    pub(super) label: &'a str,
    /// Whether every power of ten takes the same width; values must then be above 0.
    pub(super) logarithmic: bool,
    /// Text at a tick.
    pub(super) tick: fn(f64) -> String,
}

/// A line through points, in order.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Its name in the legend.
    pub(super) name: String,
    /// x and y.
    pub(super) points: Vec<(f64, f64)>,
}

/// A bar with its interval.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    /// Its name below the axis.
    pub(super) name: String,
    /// Its height.
    pub(super) value: f64,
    /// Lower end of the interval.
    pub(super) low: f64,
    /// Upper end of the interval.
    pub(super) high: f64,
}

/// A number without needless digits, for [`Axis::tick`].
pub(super) fn plain(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{:.2}", value).trim_end_matches('0').trim_end_matches('.').to_owned(),
        _ => format!("{value:.3}"),
    }
}

/// Draws `lines` over common axes, with a legend if there are several. Returns a complete SVG document.
///
/// # Errors
/// [`PlotError`] without any point that can be drawn.
pub(super) fn lines(title: &str, x: Axis<'_>, y: Axis<'_>, lines: &[Line]) -> Result<String, PlotError> {
    lines_on(&Canvas::default(), title, x, y, lines)
}

/// As [`lines`], on a given canvas; without room for a title if it is empty.
///
/// # Errors
/// [`PlotError`] without any point that can be drawn.
pub(super) fn lines_on(
    canvas: &Canvas,
    title: &str,
    x: Axis<'_>,
    y: Axis<'_>,
    lines: &[Line],
) -> Result<String, PlotError> {
    let fits = |axis: Axis<'_>, value: f64| value.is_finite() && (!axis.logarithmic || value > 0.0);
    let drawable = |line: &Line| {
        let points = line.points.iter().copied().filter(|point| fits(x, point.0) && fits(y, point.1));
        Line { name: line.name.clone(), points: points.collect() }
    };
    let lines: Vec<Line> = lines.iter().map(drawable).collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let across = range(x, points().map(|point| point.0)).ok_or_else(|| failed("there is no point"))?;
    let highest = Some(canvas.up_to).filter(|up_to| *up_to > 0.0);
    let up =
        range(y, points().map(|point| point.1).chain(highest)).ok_or_else(|| failed("there is no point"))?;
    match (x.logarithmic, y.logarithmic) {
        (false, false) => draw_lines(canvas, title, (x, across), (y, up), &lines),
        (true, false) => draw_lines(canvas, title, (x, across.log_scale()), (y, up), &lines),
        (false, true) => draw_lines(canvas, title, (x, across), (y, up.log_scale()), &lines),
        (true, true) => draw_lines(canvas, title, (x, across.log_scale()), (y, up.log_scale()), &lines),
    }
}

/// A range of all values with a margin; a linear axis starts at 0.
fn range(axis: Axis<'_>, values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if !low.is_finite() {
        return None;
    }
    Some(match axis.logarithmic {
        true => low * 0.9..high * 1.1,
        false => low.min(0.0)..if high > 0.0 { high * 1.05 } else { 1.0 },
    })
}

fn draw_lines<X, Y>(
    canvas: &Canvas,
    title: &str,
    x: (Axis<'_>, X),
    y: (Axis<'_>, Y),
    lines: &[Line],
) -> Result<String, PlotError>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, canvas.size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let mut builder = ChartBuilder::on(&area);
        builder.margin(12);
        if !title.is_empty() {
            builder.caption(title, ("sans-serif", LABEL + 6));
        }
        builder.y_label_area_size(LEFT).x_label_area_size(BELOW);
        let mut chart = builder.build_cartesian_2d(x.1, y.1).map_err(failed)?;
        let (across, up) = (x.0.tick, y.0.tick);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(x.0.label)
            .y_desc(y.0.label)
            .label_style(("sans-serif", LABEL))
            .x_labels(canvas.labels_across())
            .y_labels(canvas.labels_up())
            .x_label_formatter(&|value| across(*value))
            .y_label_formatter(&|value| up(*value))
            .draw()
            .map_err(failed)?;
        if let Some(band) = &canvas.band {
            let up = chart.as_coord_spec().get_y_range();
            let body = [(band.start, up.start), (band.end, up.end)];
            let shade = BLACK.mix(0.12).filled();
            chart.plotting_area().draw(&Rectangle::new(body, shade)).map_err(failed)?;
        }
        for (index, line) in lines.iter().enumerate() {
            let color = color(index).stroke_width(2);
            let drawn =
                chart.draw_series(LineSeries::new(line.points.iter().copied(), color)).map_err(failed)?;
            drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
        }
        if lines.len() > 1 && canvas.legend {
            let mut legend = chart.configure_series_labels();
            legend.position(SeriesLabelPosition::UpperLeft).label_font(("sans-serif", LABEL));
            legend.background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw().map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// Draws one bar for each of `bars`, each with its interval as a whisker, over the axis `y` from 0. Returns a complete
/// SVG document.
///
/// # Errors
/// [`PlotError`] without any bar that can be drawn.
pub(super) fn bars(title: &str, y: Axis<'_>, bars: &[Bar]) -> Result<String, PlotError> {
    let up = Axis { logarithmic: false, ..y };
    let up = range(up, bars.iter().map(|bar| bar.high)).ok_or_else(|| failed("there is no bar"))?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, Canvas::default().size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let mut builder = ChartBuilder::on(&area);
        builder.caption(title, ("sans-serif", LABEL + 6)).margin(12);
        builder.y_label_area_size(LEFT).x_label_area_size(BELOW);
        let mut chart = builder.build_cartesian_2d(0.0..bars.len() as f64, up).map_err(failed)?;
        // A name is centred below its bar; the other ticks have no text.
        let name = |x: &f64| match ((x * 2.0).round() as usize, (x * 2.0).fract() == 0.0) {
            (halves, true) if halves % 2 == 1 => {
                bars.get(halves / 2).map_or_else(String::new, |bar| bar.name.clone())
            }
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(2 * bars.len() + 1)
            .x_label_formatter(&name)
            .y_label_formatter(&|value| (y.tick)(*value))
            .y_desc(y.label)
            .label_style(("sans-serif", LABEL))
            .draw()
            .map_err(failed)?;
        for (index, bar) in bars.iter().enumerate() {
            let (left, middle) = (index as f64 + 0.2, index as f64 + 0.5);
            let body = [(left, 0.0), (left + 0.6, bar.value)];
            let color = color(index);
            chart.plotting_area().draw(&Rectangle::new(body, color.filled())).map_err(failed)?;
            let whisker = PathElement::new([(middle, bar.low), (middle, bar.high)], BLACK.stroke_width(2));
            chart.plotting_area().draw(&whisker).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// Draws `bars` one below the other, each with its name before it and its value after it. Returns a complete SVG
/// document.
///
/// # Errors
/// [`PlotError`] without any bar.
pub(super) fn bars_across(canvas: &Canvas, x: Axis<'_>, bars: &[(&str, f64)]) -> Result<String, PlotError> {
    let across = range(x, bars.iter().map(|bar| bar.1)).ok_or_else(|| failed("there is no bar"))?;
    // Room for the longest bar's value.
    let across = 0.0..across.end * if canvas.size.0 > 600 { 1.1 } else { 1.35 };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, canvas.size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let mut builder = ChartBuilder::on(&area);
        builder.margin(12).y_label_area_size(LEFT).x_label_area_size(BELOW);
        let last = bars.len() as f64;
        // The first is on top.
        let mut chart = builder.build_cartesian_2d(across, last..0.0).map_err(failed)?;
        let tick = |value: &f64| (x.tick)(*value);
        let mesh = &mut chart.configure_mesh();
        mesh.disable_y_mesh().light_line_style(TRANSPARENT).y_labels(0).x_labels(canvas.labels_across());
        mesh.x_desc(x.label).label_style(("sans-serif", LABEL)).x_label_formatter(&tick);
        mesh.draw().map_err(failed)?;
        let font = ("sans-serif", LABEL).into_font().color(&BLACK);
        let plotted = chart.plotting_area();
        for (index, (name, value)) in bars.iter().enumerate() {
            let (top, middle) = (index as f64 + 0.2, index as f64 + 0.5);
            plotted
                .draw(&Rectangle::new([(0.0, top), (*value, top + 0.6)], color(index).filled()))
                .map_err(failed)?;
            let text = (x.tick)(*value);
            let behind = EmptyElement::at((*value, middle)) + Text::new(text, (6, -7), font.clone());
            plotted.draw(&behind).map_err(failed)?;
            let (x, y) = plotted.map_coordinate(&(0.0, middle));
            let right = font.pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Right,
                plotters::style::text_anchor::VPos::Center,
            ));
            area.draw_text(name, &right, (x - 8, y)).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

/// Draws a group of bars for each of `groups`: its name and one height for each kind, over the logarithmic axis `y`. A
/// height below 1 has no bar. Returns a complete SVG document.
///
/// # Errors
/// [`PlotError`] without any group.
pub(super) fn groups(
    canvas: &Canvas,
    x_label: &str,
    y: Axis<'_>,
    groups: &[(String, Vec<f64>)],
) -> Result<String, PlotError> {
    const FLOOR: f64 = 0.7;
    let most = groups.iter().flat_map(|group| &group.1).copied().fold(10.0, f64::max);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, canvas.size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        let mut builder = ChartBuilder::on(&area);
        builder.margin(12).y_label_area_size(LEFT).x_label_area_size(BELOW);
        let across = -0.5..groups.len().max(1) as f64 - 0.5;
        let mut chart =
            builder.build_cartesian_2d(across, (FLOOR..most * 1.5).log_scale()).map_err(failed)?;
        let name = |at: &f64| {
            let index = at.round();
            let group =
                (index >= 0.0 && (at - index).abs() < 1e-6).then(|| groups.get(index as usize)).flatten();
            group.map_or_else(String::new, |group| group.0.clone())
        };
        let mesh = &mut chart.configure_mesh();
        mesh.disable_x_mesh().light_line_style(TRANSPARENT).label_style(("sans-serif", LABEL));
        mesh.x_labels(groups.len().clamp(2, canvas.labels_across() * 2)).y_labels(canvas.labels_up());
        mesh.x_desc(x_label).y_desc(y.label).x_label_formatter(&name);
        mesh.y_label_formatter(&|value| (y.tick)(*value)).draw().map_err(failed)?;
        for (index, (_, heights)) in groups.iter().enumerate() {
            let width = 0.8 / heights.len().max(1) as f64;
            for (kind, height) in heights.iter().enumerate().filter(|(_, height)| **height >= 1.0) {
                let left = index as f64 - 0.4 + kind as f64 * width;
                let body = [(left, FLOOR), (left + width, *height)];
                let bar = Rectangle::new(body, color(kind).filled());
                chart.plotting_area().draw(&bar).map_err(failed)?;
            }
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TIME: Axis<'_> = Axis { label: "time, s", logarithmic: false, tick: plain };
    const RATE: Axis<'_> = Axis { label: "rate, GB/s", logarithmic: true, tick: plain };

    fn count(svg: &str, what: &str) -> usize {
        svg.matches(what).count()
    }

    #[test]
    fn every_line_has_its_path_and_its_name_and_text_is_escaped() {
        let line = |name: &str, factor: f64| Line {
            name: name.into(),
            points: (1..20).map(|x| (f64::from(x), f64::from(x) * factor)).collect(),
        };
        for (x, y) in [(TIME, TIME), (TIME, RATE), (RATE, TIME), (RATE, RATE)] {
            let svg = lines("a < b", x, y, &[line("ours", 1.0), line("theirs", 3.0)]).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
            assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
            assert!(svg.contains(x.label) && svg.contains(y.label) && svg.contains("theirs"));
            // One for each line and one for each entry of the legend, in addition to those of the mesh.
            assert!(count(&svg, "stroke-width=\"2\"") >= 4, "{svg}");
        }
    }

    #[test]
    fn points_that_an_axis_does_not_have_are_left_out_and_none_is_an_error() {
        let line = |points| Line { name: "one".into(), points };
        let mixed = vec![(0.0, 1.0), (1.0, f64::NAN), (1.0, -5.0), (2.0, 3.0)];
        assert!(lines("", RATE, RATE, &[line(mixed)]).is_ok());
        assert!(lines("", RATE, RATE, &[line(vec![(0.0, 0.0)])]).is_err());
        assert!(lines("", TIME, TIME, &[]).is_err());
        assert!(lines("", TIME, TIME, &[line(vec![(0.0, 0.0)])]).is_ok());
    }

    #[test]
    fn every_bar_has_its_body_its_whisker_and_its_name() {
        let bar = |name: &str, value| Bar { name: name.into(), value, low: value * 0.9, high: value * 1.1 };
        let svg = bars("rates", TIME, &[bar("ramwire", 3.5), bar("qemu10", 2.1), bar("floor", 3.2)]).unwrap();
        assert!(["ramwire", "qemu10", "floor"].iter().all(|name| count(&svg, name) == 1), "{svg}");
        assert_eq!(count(&svg, "<rect") - 1, 3, "three beside the background");
        assert_eq!(count(&svg, "stroke-width=\"2\""), 3);
        assert!(bars("", TIME, &[]).is_err());
    }

    #[test]
    fn bars_across_and_groups_have_every_bar_and_stand_in_the_page_s_colours() {
        let canvas = Canvas { size: (380, 260), legend: false, ..Canvas::default() };
        let svg = bars_across(&canvas, TIME, &[("pause", 1.0), ("pages", 20.0), ("state", 0.0)]).unwrap();
        assert_eq!(count(&svg, "<rect") - 1, 3, "{svg}");
        assert!(svg.contains("pause") && svg.contains("20"));
        let rows = [("1".to_owned(), vec![1000.0, 3.0, 0.0]), ("2".to_owned(), vec![0.0, 0.0, 5.0])];
        let svg = groups(&canvas, "round", RATE, &rows).unwrap();
        assert_eq!(count(&svg, "<rect") - 1, 3, "{svg}");
        let page = themed(&svg);
        assert!(
            !page.contains("#") && count(&page, "var(--c0)") == 1 && count(&page, "var(--c2)") == 1,
            "{page}"
        );
        assert!(page.contains("var(--ink)") && page.contains("\"none\""));
        assert!(bars_across(&canvas, TIME, &[]).is_err() && groups(&canvas, "", RATE, &[]).is_ok());
    }

    #[test]
    fn ticks_have_no_needless_digits() {
        let shown = [0.0, 0.25, 1.0, 2.5, 99.0, 1234.5].map(plain);
        assert_eq!(shown, ["0", "0.250", "1", "2.5", "99", "1234"]);
    }
}
