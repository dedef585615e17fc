use super::*;

/// A backend in a directory of its own, which starts nothing.
fn local(base: &Path) -> Local {
    let agent = std::env::current_exe().unwrap();
    Local {
        directories: Arc::new(Directories::open(base.join("weavers"), agent, None).unwrap()),
        server_url: String::new(),
        server_authorities: None,
        image: String::new(),
        isolated_network: true,
        udp: false,
        repositories: Vec::new(),
        warnings: Vec::new(),
        changes: mpsc::channel(1).0,
        phases: Mutex::default(),
        watched: Arc::default(),
    }
}

/// A weaver's directory with a supervisor that lives for as long as what is returned: this process stands for it.
fn supervised(local: &Local, weaver: WeaverId) -> File {
    let New { directory, lock } = local.directories.make(weaver, |uid| local.spec(weaver, uid)).unwrap();
    fs::write(directory.join("lock"), std::process::id().to_string()).unwrap();
    lock
}

fn write(local: &Local, weaver: WeaverId, status: &LocalStatus) {
    let file = local.directories.path(weaver).join("status.json");
    fs::write(file, serde_json::to_vec(status).unwrap()).unwrap();
}

fn shown(local: &Local, weaver: WeaverId) -> Option<String> {
    local.pod(weaver)?.phase
}

#[tokio::test]
async fn the_phase_that_is_shown_follows_the_process_tree() {
    let ends = [
        (LocalStatus::Exited { code: 0 }, "Succeeded", Some(0), None),
        (LocalStatus::Exited { code: 3 }, "Failed", Some(3), None),
        (LocalStatus::Failed { reason: "no root".to_owned() }, "Failed", None, Some("no root")),
    ];
    for (end, phase, code, reason) in ends {
        let directory = tempfile::tempdir().unwrap();
        let (local, weaver) = (local(directory.path()), WeaverId::generate());
        assert_eq!(local.observe(weaver).await.unwrap(), None);
        assert_eq!(shown(&local, weaver), None, "there is no pod yet");

        let supervisor = supervised(&local, weaver);
        assert_eq!(local.observe(weaver).await.unwrap().unwrap().phase, PodPhase::Pending);
        assert_eq!(shown(&local, weaver).as_deref(), Some("Pending"));
        write(&local, weaver, &LocalStatus::Running);
        assert_eq!(shown(&local, weaver).as_deref(), Some("Running"), "nobody has to look first");

        write(&local, weaver, &end);
        drop(supervisor);
        let seen = local.observe(weaver).await.unwrap().unwrap();
        assert_eq!((seen.exit_code, seen.reason.as_deref()), (code, reason));
        assert_eq!(shown(&local, weaver).as_deref(), Some(phase));

        assert!(local.remove(weaver).await.unwrap());
        assert_eq!(shown(&local, weaver), None, "nothing is left");
    }
}

#[tokio::test]
async fn a_supervisor_that_was_killed_leaves_a_failed_pod() {
    let directory = tempfile::tempdir().unwrap();
    let (local, weaver) = (local(directory.path()), WeaverId::generate());
    let supervisor = supervised(&local, weaver);
    write(&local, weaver, &LocalStatus::Running);
    assert_eq!(local.observe(weaver).await.unwrap().unwrap().phase, PodPhase::Running);
    drop(supervisor);
    let seen = local.observe(weaver).await.unwrap().unwrap();
    assert!(seen.reason.is_some_and(|reason| reason.contains("killed from outside")));
    assert_eq!(shown(&local, weaver).as_deref(), Some("Failed"));
}

#[tokio::test]
async fn a_pod_is_pending_also_while_its_supervisor_is_being_started() {
    let directory = tempfile::tempdir().unwrap();
    let (local, weaver) = (local(directory.path()), WeaverId::generate());
    let supervisor = supervised(&local, weaver);
    local.observe(weaver).await.unwrap();
    // As it is before the supervisor has written its pid: it is not known yet how it is.
    fs::write(local.directories.path(weaver).join("lock"), "").unwrap();
    assert!(local.observe(weaver).await.is_err());
    assert_eq!(shown(&local, weaver).as_deref(), Some("Pending"));
    drop(supervisor);
}
