//! The `finetune` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    finetune_cli::main()
}
