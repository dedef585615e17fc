//! A disk that fills up while the server runs.

use std::{fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Result, ensure};
use loom_tests::{System, disk::Disk, eventually, system::TIMEOUT};

#[test]
fn on_a_full_disk_weavers_still_end_and_nothing_is_lost_when_space_returns() -> Result<()> {
    // Mounting needs root, as the cluster's tests do.
    if !rustix::process::geteuid().is_root() {
        println!("left out: only root can mount a small disk");
        return Ok(());
    }
    let disk = Disk::mount("size=512m")?;
    let data = disk.path().join("data");
    fs::create_dir(&data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o711))?;
    // On the same disk, so that weavers have links to it and no copies.
    let agent = disk.path().join("loom-agent");
    fs::copy(System::binary("loom-agent")?, &agent)?;
    let system = System::start_in(&data, &[("LOOM_SERVER_AGENT", &agent.to_string_lossy())])?;
    let token = system.admin_token()?;
    let kept = system.new_weaver(&["--name", "kept"])?;
    let deleted = system.new_weaver(&["--name", "deleted"])?;
    let expiring = system.new_weaver(&["--name", "expiring", "--ttl", "12s"])?;
    let ready = || Ok::<_, anyhow::Error>(system.request(None, "GET", "/readyz", None)?.status);
    ensure!(ready()? == 200);

    disk.fill()?;
    eventually("the server to say that its disk is full", TIMEOUT, || Ok((ready()? == 503).then_some(())))?;
    let refused = system.request(Some(&token), "POST", "/api/weavers", Some("{}"))?;
    assert_eq!((refused.status, refused.code()), (503, "unavailable"), "{refused:?}");
    system.run(&["delete", "--yes", "deleted"])?;
    eventually("the deleted one to be gone", TIMEOUT, || Ok((!system.has_left_something(&deleted)?).then_some(())))?;
    eventually("the deadline to be kept", TIMEOUT, || Ok((!system.has_left_something(&expiring)?).then_some(())))?;
    assert_eq!(system.run(&["exec", "kept", "--", "echo", "alive"])?, "alive\n");

    disk.empty()?;
    eventually("the server to be ready again", TIMEOUT, || Ok((ready()? == 200).then_some(())))?;
    assert_eq!(system.describe(&kept)?["status"], "Running");
    assert!(system.run(&["events", "deleted"])?.contains("deleted it"));
    system.new_weaver(&["--name", "new"])?;
    system.stop()
}
