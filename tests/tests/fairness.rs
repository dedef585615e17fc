//! What one organisation's weavers do keeps no other organisation waiting. `kubernetes.rs` has the same for images at a
//! registry that does not answer.

use std::fs;

use anyhow::{Result, ensure};
use loom_tests::{System, eventually, fairness::ensure_fair, processes::signal, system::TIMEOUT};
use rustix::process::Signal;
use serde_json::json;

#[test]
fn stubborn_removals_of_one_organisation_delay_no_start_of_another() -> Result<()> {
    const MANY: usize = 40;
    let system = System::start()?;
    let alone = system.time_of_a_start()?;

    let ada = system.add_user("ada")?;
    // It does not end when it is told to, so its removal takes as long as the backend is patient.
    let stubborn = json!({"command": ["sh", "-c", "trap '' TERM; touch ready; while :; do sleep 1000; done"]});
    let weavers = system.crowd(&ada, MANY, &stubborn)?;
    ensure!(weavers.len() == MANY, "{} weavers were made", weavers.len());
    for weaver in &weavers {
        let ready = system.weaver_directory(weaver).join("workspace/ready");
        eventually("a program that ignores the signal", TIMEOUT, || Ok(ready.exists().then_some(())))?;
    }
    system.delete_all(&ada, &weavers)?;
    let beside = system.time_of_a_start()?;
    ensure_fair(alone, beside)?;
    let left = weavers.iter().filter(|weaver| system.weaver_directory(weaver).exists()).count();
    ensure!(left > MANY / 4, "only {left} were still being removed at the end of the measurement");
    // The rest of the wait would show nothing more.
    for weaver in &weavers {
        let Ok(supervisor) = fs::read_to_string(system.weaver_directory(weaver).join("lock")) else { continue };
        signal(supervisor.trim().parse()?, Signal::KILL);
    }
    system.stop()
}
