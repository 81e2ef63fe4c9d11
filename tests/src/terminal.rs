//! A terminal that a command runs on, and what stands on it in the end.

use crate::occyctl;
use crate::tools::run;

/// What a command left on its terminal.
#[derive(Clone, Debug)]
pub struct Screen {
    /// The exit code.
    pub code: Option<i32>,
    /// All that was written, escape sequences included.
    pub written: String,
    /// The lines as they stand there now, those that have scrolled away too, without spaces at their ends.
    pub lines: Vec<String>,
    /// Whether any text ran over the right margin.
    pub wrapped: bool,
}

/// Runs `occyctl` with arguments that need no quoting on a terminal of that size.
pub fn on_terminal(columns: usize, rows: usize, arguments: &[&str]) -> Screen {
    let (program, arguments) = (occyctl::path().display(), arguments.join(" "));
    let command = format!("stty cols {columns} rows {rows}; exec {program} {arguments}");
    let output = run("script", ["--quiet", "--return", "--command", &command, "/dev/null"], b"");
    let written = String::from_utf8_lossy(&output.stdout).into_owned();
    let (lines, wrapped) = render(&written, columns);
    Screen { code: output.status.code(), written, lines, wrapped }
}

/// The few control sequences that the program uses: any other is a failure of the test that meets it.
fn render(written: &str, columns: usize) -> (Vec<String>, bool) {
    let mut lines: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column, mut wrapped) = (0_usize, 0_usize, false);
    let mut rest = written.chars();
    while let Some(c) = rest.next() {
        match c {
            '\r' => column = 0,
            '\n' => row += 1,
            '\x1b' => {
                assert_eq!(rest.next(), Some('['), "an unknown sequence in {written:?}");
                let sequence = sequence(&mut rest);
                let (count, action) = sequence.split_at(sequence.len() - 1);
                match action {
                    "A" => row = row.saturating_sub(count.parse().unwrap_or(1)),
                    "J" => {
                        lines.truncate(row + 1);
                        lines[row].truncate(column);
                    }
                    _ => panic!("an unknown sequence {sequence:?} in {written:?}"),
                }
            }
            c => {
                if column == columns {
                    (row, column, wrapped) = (row + 1, 0, true);
                }
                lines.resize(lines.len().max(row + 1), Vec::new());
                let line = &mut lines[row];
                line.resize(line.len().max(column + 1), ' ');
                line[column] = c;
                column += 1;
            }
        }
        lines.resize(lines.len().max(row + 1), Vec::new());
    }
    let lines = lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned());
    (lines.collect(), wrapped)
}

/// What follows `ESC [`, up to the letter that ends it.
fn sequence(rest: &mut impl Iterator<Item = char>) -> String {
    let mut text = String::new();
    for c in rest {
        text.push(c);
        if c.is_ascii_alphabetic() {
            break;
        }
    }
    text
}
