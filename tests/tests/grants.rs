//! A weaver that very many devices may reach: its agent comes back to all of them.

use std::{collections::BTreeSet, time::Instant};

use anyhow::{Result, ensure};
use loom_tests::{System, Weaver, eventually, keys::KeyPair, system::TIMEOUT};

/// The most devices of one user.
const OF_A_USER: usize = 1000;
/// The most grants of one weaver.
const OF_A_WEAVER: usize = 10_000;

/// Many users' devices, all of which may reach one weaver.
struct Crowd {
    system: System,
    weaver: Weaver,
    /// Each with its owner's token.
    devices: Vec<(String, KeyPair)>,
}

impl Crowd {
    /// Admits `count` devices with as many candidates each as they may have.
    fn admit(count: usize) -> Result<Self> {
        let system = System::start()?;
        system.manage(&["org", "create", "engines"])?;
        system.manage(&["org", "add-member", "engines", "admin"])?;
        let weaver = system.new_weaver(&["--org", "engines"])?;
        let mut devices = Vec::new();
        while devices.len() < count {
            let name = format!("user{}", devices.len() / OF_A_USER);
            let token = system.add_user(&name)?;
            system.manage(&["org", "add-member", "engines", &name])?;
            for _ in 0..OF_A_USER.min(count - devices.len()) {
                devices.push((token.clone(), KeyPair::generate()?));
            }
        }
        let candidates: Vec<_> = (0..16).map(|number| format!("[2001:db8::{number}]:40000")).collect();
        let start = Instant::now();
        let asked: Vec<_> = devices.iter().map(|(token, device)| (token.as_str(), device)).collect();
        let answers = system.open_tunnels(&weaver, &asked, &candidates)?;
        eprintln!("{count} devices were admitted in {:?}", start.elapsed());
        ensure!(answers.get(&200) == Some(&count) && answers.len() == 1, "not all were admitted: {answers:?}");
        Ok(Self { system, weaver, devices })
    }

    /// Kills the sidecar, and waits until the next one admits the same devices.
    fn restart_the_agent(&self) -> Result<()> {
        let (system, weaver) = (&self.system, &self.weaver);
        let wanted: BTreeSet<_> = self.devices.iter().map(|(_, device)| device.public()).collect();
        ensure!(system.admitted_devices(weaver)? == wanted, "not all are in force before the restart");
        let start = Instant::now();
        system.restart_sidecar(weaver)?;
        let mut admitted = BTreeSet::new();
        eventually("all grants to be in force again", TIMEOUT, || {
            admitted = system.admitted_devices(weaver)?;
            Ok((admitted == wanted).then_some(()))
        })
        .map_err(|error| error.context(format!("{} of {} are", admitted.len(), wanted.len())))?;
        eprintln!("and again in {:?}", start.elapsed());
        Ok(())
    }

    fn stop(self) -> Result<()> {
        // Another organisation's is not deleted with the system.
        self.system.run(&["delete", "--yes", &self.weaver.id])?;
        self.system.stop()
    }
}

#[test]
fn an_agent_comes_back_to_many_devices_with_many_addresses() -> Result<()> {
    let crowd = Crowd::admit(1150)?;
    crowd.restart_the_agent()?;
    assert_eq!(crowd.system.run(&["exec", &crowd.weaver.id, "--", "echo", "in"])?, "in\n");
    crowd.stop()
}

#[test]
fn an_agent_comes_back_to_as_many_devices_as_may_be() -> Result<()> {
    let crowd = Crowd::admit(OF_A_WEAVER)?;
    let (system, weaver) = (&crowd.system, &crowd.weaver);
    let refused = system.open_tunnel(&system.admin_token()?, weaver, &KeyPair::generate()?)?;
    assert_eq!((refused.status, refused.code()), (429, "too_many_devices"), "one more: {refused:?}");
    crowd.restart_the_agent()?;
    // One leaves, and another one comes.
    let (token, device) = &crowd.devices[0];
    let gone = system.request(Some(token), "DELETE", &format!("/api/devices/{}", device.in_url()), None)?;
    assert_eq!(gone.status, 204);
    assert_eq!(system.run(&["exec", &weaver.id, "--", "echo", "in"])?, "in\n");
    crowd.stop()
}
