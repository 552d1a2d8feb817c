//! The output of the program. A failed print is reported on standard error, and has no other effect.

use std::fmt::Arguments;
use std::io::{self, Write};

/// A line to standard error.
macro_rules! note {
    ($($text:tt)*) => { $crate::output::note_line(::std::format_args!($($text)*)) };
}
pub(crate) use note;

/// Writes a line of the result to standard output.
macro_rules! result_line {
    ($($text:tt)*) => { $crate::output::result(::std::format_args!("{}\n", ::std::format_args!($($text)*))) };
}
pub(crate) use result_line;

/// Writes the result's text to standard output, unchanged.
macro_rules! result_text {
    ($($text:tt)*) => { $crate::output::result(::std::format_args!($($text)*)) };
}
pub(crate) use result_text;

/// See [`note!`].
pub fn note_line(text: Arguments<'_>) {
    // There is no place left to report a failure of standard error to.
    let _ = writeln!(io::stderr(), "{text}");
}

/// See [`result_line!`] and [`result_text!`].
pub fn result(text: Arguments<'_>) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_fmt(text).and_then(|()| out.flush())
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        note!("ramwire-bench: standard output: {error}");
    }
}
