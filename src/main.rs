use std::process::ExitCode;

fn main() -> ExitCode {
    grid_mount::cli::main()
}
