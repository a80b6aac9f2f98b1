//! The `finetune` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    finetune::cli::main()
}
