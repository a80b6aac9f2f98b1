//! The `FineTuneJob` API: spec, status, conditions, reasons. No I/O.
