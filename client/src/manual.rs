//! The manual page, made of the words that `--help` has: every command with its options and their variables on one page, and
//! what stands in columns kept in them.

use clap::{Arg, Command};
use roff::{Roff, bold, italic, roman};

/// The page of `command` and of all its commands, for `man`.
pub(crate) fn page(command: &mut Command) -> String {
    command.build();
    let name = command.get_name().to_owned();
    let mut page = Roff::new();
    let version = command.get_version().unwrap_or_default();
    page.control("TH", [&*name.to_uppercase(), "1", "", &*format!("{name} {version}")]);
    page.control("SH", ["NAME"]);
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    page.text([roman(format!("{name} - {about}"))]);
    page.control("SH", ["SYNOPSIS"]);
    let commands = commands(&name, command);
    for (name, command) in &commands {
        page.text([bold(name), roman(arguments(command))]);
        page.control("br", []);
    }
    page.control("SH", ["DESCRIPTION"]);
    paragraphs(&mut page, command);
    page.control("SH", ["COMMANDS"]);
    let global = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    for (name, command) in &commands {
        page.control("SS", [&**name]);
        paragraphs(&mut page, command);
        let own = command.get_arguments().filter(|argument| !argument.is_global_set());
        own.for_each(|argument| option(&mut page, argument));
        let after = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
        if after != global {
            page.control("PP", []);
            kept(&mut page, &after);
        }
    }
    page.control("SH", ["OPTIONS OF EVERY COMMAND"]);
    command.get_arguments().for_each(|argument| option(&mut page, argument));
    let mut is_first = true;
    for section in global.split("\n\n").flat_map(sections) {
        match section {
            Section::Title(title) => {
                page.control("SH", [&*title.to_uppercase()]);
                is_first = true;
            }
            Section::Lines(lines) => {
                if !std::mem::take(&mut is_first) {
                    page.control("sp", []);
                }
                kept(&mut page, &lines);
            }
        }
    }
    page.to_roff()
}

/// What the help text of a program is made of.
enum Section {
    /// `Examples:`
    Title(String),
    /// What stands below it.
    Lines(String),
}

/// A paragraph that begins with a line that is not indented and ends with a colon begins a section.
fn sections(paragraph: &str) -> Vec<Section> {
    let (first, rest) = paragraph.split_once('\n').unwrap_or((paragraph, ""));
    // What stands in brackets behind a title is the grammar of what follows.
    match first.split_once(" (").map_or(first, |(title, _)| title).split_once([':', ',']) {
        Some((title, _)) if !first.starts_with(' ') && first.ends_with(':') => {
            let lines = if first == format!("{title}:") { rest.to_owned() } else { paragraph.to_owned() };
            vec![Section::Title(title.to_owned()), Section::Lines(lines)]
        }
        _ => vec![Section::Lines(paragraph.to_owned())],
    }
}

/// Every command that can be run, with its full name.
fn commands<'a>(name: &str, command: &'a Command) -> Vec<(String, &'a Command)> {
    let below = command.get_subcommands().filter(|command| command.get_name() != "help");
    let below = below.flat_map(|command| {
        let name = format!("{name} {}", command.get_name());
        match command.has_subcommands() {
            true => commands(&name, command),
            false => vec![(name, command)],
        }
    });
    below.collect()
}

/// ` SOURCE DESTINATION [OPTIONS]`.
fn arguments(command: &Command) -> String {
    let positional = command.get_positionals().map(|argument| format!(" {}", placeholder(argument)));
    positional.chain([" [OPTIONS]".to_owned()]).collect()
}

fn placeholder(argument: &Arg) -> String {
    match argument.get_value_names() {
        Some([name, ..]) => name.to_string(),
        _ => argument.get_id().as_str().to_uppercase(),
    }
}

fn paragraphs(page: &mut Roff, command: &Command) {
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    for paragraph in about.split("\n\n") {
        page.control("PP", []);
        page.text([roman(paragraph)]);
    }
}

fn option(page: &mut Roff, argument: &Arg) {
    page.control("TP", []);
    let mut names = Vec::new();
    names.extend(argument.get_short().map(|short| format!("-{short}")));
    names.extend(argument.get_long().map(|long| format!("--{long}")));
    let takes_value = argument.get_action().takes_values();
    let heading = match (names.is_empty(), takes_value) {
        (true, _) => vec![italic(placeholder(argument))],
        (false, true) => vec![bold(names.join(", ")), roman(" "), italic(placeholder(argument))],
        (false, false) => vec![bold(names.join(", "))],
    };
    page.text(heading);
    let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut facts = Vec::new();
    let defaults: Vec<_> =
        argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if takes_value && !defaults.is_empty() {
        facts.push(format!("default: {}", defaults.join(", ")));
    }
    let choices: Vec<_> =
        argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if takes_value && !choices.is_empty() {
        facts.push(format!("one of: {}", choices.join(", ")));
    }
    facts.extend(argument.get_env().map(|variable| format!("variable: {}", variable.to_string_lossy())));
    let facts = if facts.is_empty() { String::new() } else { format!(" [{}]", facts.join("; ")) };
    page.text([roman(format!("{}{facts}", help.replace("\n\n", " ")))]);
}

/// Lines as they are: examples that are meant to be copied, and columns.
fn kept(page: &mut Roff, lines: &str) {
    page.control("nf", []);
    for line in lines.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []);
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use crate::options::Cli;

    #[test]
    fn the_page_has_every_command_option_and_variable() {
        let mut command = Cli::command();
        let page = super::page(&mut command).replace("\\-", "-");
        let commands = super::commands("occyctl", &command);
        let arguments = commands.iter().flat_map(|(_, command)| command.get_arguments());
        for argument in arguments.chain(command.get_arguments()) {
            let long = argument.get_long().map(|long| format!("--{long}"));
            let variable = argument.get_env().map(|variable| variable.to_string_lossy().into_owned());
            for word in long.into_iter().chain(variable) {
                assert!(page.contains(&word), "{word}");
            }
        }
        for (name, _) in &commands {
            assert!(page.contains(name), "{name}");
        }
        assert!(page.contains("occyctl job submit"));
    }

    #[test]
    fn examples_are_kept_as_they_can_be_copied() {
        let page = super::page(&mut Cli::command()).replace("\\-", "-");
        let example = "    occyctl check registry://localhost:5000/app:1\n";
        assert!(page.contains(example), "{page}");
        assert!(page.contains(".SH EXAMPLES") && page.contains(".SH \"EXIT STATUS\""), "{page}");
    }
}
