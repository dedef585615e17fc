//! Places between two writes where a test has the server die, to show that it converges from each. Not in release
//! builds.

/// Names the place, for the test.
#[cfg(debug_assertions)]
const VARIABLE: &str = "LOOM_SERVER_FAULT";

/// Ends the process as a crash would, if the test asked for it here.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    if std::env::var_os(VARIABLE).is_some_and(|wanted| wanted == name) {
        tracing::warn!("dying at {name}, as a test asked for");
        std::process::abort();
    }
}

/// See above.
#[cfg(not(debug_assertions))]
pub(crate) const fn point(_: &str) {}
