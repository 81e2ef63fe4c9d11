//! The variables that options come from, read as users write them: an empty one is not set, a flag takes `1` and `yes` as well as
//! `true`, and a value that makes no sense is traced to its variable.

use clap::builder::{BoolishValueParser, OsStr, Resettable, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches};

use crate::options::Cli;
use crate::say;

/// The command line with what the environment adds. Ends the program where they make no sense, or ask for help.
pub(crate) fn parse() -> Cli {
    let command = read_all(Cli::command());
    let error = match command.clone().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => return cli,
        Err(error) => error,
    };
    // Nobody can be told that they cannot be told.
    let _ = error.print();
    if let Some(variable) = variable(&command, &error) {
        say(&format!("note: the value is that of {variable} in the environment"));
    }
    std::process::exit(error.exit_code())
}

fn read_all(command: Command) -> Command {
    command.mut_args(read).mut_subcommands(read_all)
}

fn read(argument: Arg) -> Arg {
    let is_flag = matches!(argument.get_action(), ArgAction::SetTrue);
    let argument = if is_flag { argument.value_parser(BoolishValueParser::new()) } else { argument };
    let value = argument.get_env().and_then(std::env::var_os);
    let is_false = |value: &std::ffi::OsStr| {
        is_flag
            && BoolishValueParser::new().parse_ref(&Command::new("occyctl"), None, value).is_ok_and(|on| !on)
    };
    // A flag that is set to false conflicts with nothing.
    match value {
        Some(value) if value.is_empty() || is_false(&value) => argument.env(Resettable::<OsStr>::Reset),
        _ => argument,
    }
}

/// The variable of the option that an error is about, if it is that which was wrong, and not the command line.
fn variable(command: &Command, error: &clap::Error) -> Option<String> {
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else { return None };
    let name = shown.split([' ', '=', '[']).next()?.strip_prefix("--")?;
    let argument = find(command, name)?;
    let (long, short) = (name, argument.get_short());
    let is_given = std::env::args().skip(1).any(|given| {
        let long =
            given.strip_prefix("--").map(|given| given.split('=').next().unwrap_or(given)) == Some(long);
        long || short.is_some_and(|short| given.starts_with(&format!("-{short}")))
    });
    let variable = argument.get_env().filter(|variable| std::env::var_os(variable).is_some())?;
    (!is_given).then(|| variable.to_string_lossy().into_owned())
}

/// The option of that name, of the command or of one below it.
fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    let own = command.get_arguments().find(|argument| argument.get_long() == Some(name));
    own.or_else(|| command.get_subcommands().find_map(|command| find(command, name)))
}
