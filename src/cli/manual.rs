//! `grid-mount completions`, `grid-mount man`: made from the grammar itself, so that they never differ from it.

use std::{fs, io, path::Path};

use clap_mangen::Man;

use super::{
    CliError,
    args::{Cli, CompletionsArgs, ManArgs},
    output,
};

const PROGRAM: &str = "grid-mount";

/// A name that the generator for bash understands: with a hyphen in it, it writes one set of labels and
/// looks for another (clap_complete 4.6), so that nothing below the first word is completed.
const BASH_NAME: &str = "grid_mount";

pub fn completions(args: &CompletionsArgs) {
    let script = |name: &str| {
        let mut script = Vec::new();
        clap_complete::generate(args.shell, &mut Cli::complete_grammar(), name, &mut script);
        String::from_utf8_lossy(&script).into_owned()
    };
    output::print(&match args.shell {
        // The name is that of the program only where the function is registered for it.
        clap_complete::Shell::Bash => {
            script(BASH_NAME).replace(&format!("default {BASH_NAME}\n"), &format!("default {PROGRAM}\n"))
        }
        _ => script(PROGRAM),
    });
}

pub fn man(args: &ManArgs) -> Result<(), CliError> {
    let grammar = Cli::complete_grammar().disable_help_subcommand(true);
    match &args.dir {
        None => {
            let page = page(&grammar, PROGRAM).map_err(CliError::failed)?;
            output::print(&page);
        }
        Some(dir) => {
            for name in pages(&grammar, PROGRAM, dir)
                .map_err(|error| CliError::Failed(format!("{}: {error}", dir.display()).into()))?
            {
                output::print(&format!("{}\n", dir.join(name).display()));
            }
        }
    }
    Ok(())
}

fn page(command: &clap::Command, name: &str) -> io::Result<String> {
    let mut text = Vec::new();
    let command = command.clone().display_name(name.to_owned());
    Man::new(command).title(name.to_uppercase()).render(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// One for the program and one for each command, and for each of theirs.
fn pages(command: &clap::Command, name: &str, dir: &Path) -> io::Result<Vec<String>> {
    fs::create_dir_all(dir)?;
    let file = format!("{name}.1");
    fs::write(dir.join(&file), page(command, name)?)?;
    let mut written = vec![file];
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        written.extend(pages(below, &format!("{name}-{}", below.get_name()), dir)?);
    }
    Ok(written)
}
