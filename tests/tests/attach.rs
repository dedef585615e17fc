//! The main terminal: several people on it at once, leaving and coming back.

use anyhow::Result;
use loom_tests::{System, eventually, system::TIMEOUT, terminal::Terminal};

#[test]
fn two_people_share_one_terminal_and_leave_it_running() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut first = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    first.send("echo from-$((1+0))\r")?;
    first.expect("from-1", TIMEOUT)?;

    let mut second = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    second.expect("from-1", TIMEOUT)?; // the newcomer sees what is on the screen
    let before = first.raw().len();
    second.send("echo from-$((1+1))\r")?;
    first.expect("from-2", TIMEOUT)?;
    second.expect("from-2", TIMEOUT)?;
    assert!(first.raw().len() > before);

    second.send("\u{4}")?; // Ctrl+D detaches, and the shell never sees it
    assert_eq!(second.wait(TIMEOUT)?.code(), Some(0));
    second.expect(&format!("loom attach {}", weaver.id), TIMEOUT)?;
    first.send("echo from-$((1+2))\r")?;
    first.expect("from-3", TIMEOUT)?;
    first.send("\u{10}\u{11}")?; // Ctrl+P Ctrl+Q does so too
    assert_eq!(first.wait(TIMEOUT)?.code(), Some(0));

    let third = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    third.expect("from-3", TIMEOUT)?;
    drop(third);
    system.stop()
}

#[test]
fn an_observer_sees_and_cannot_type() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut writer = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    let mut observer = Terminal::spawn(&system.loom(&["attach", "--read-only", &weaver.id]))?;
    writer.send("echo seen-$((1+0))\r")?;
    observer.expect("seen-1", TIMEOUT)?;
    observer.send("echo typed-$((1+0))\r")?;
    writer.send("echo seen-$((1+1))\r")?;
    observer.expect("seen-2", TIMEOUT)?;
    assert!(!writer.screen().contains("typed"), "{}", writer.screen());
    drop((writer, observer));
    system.stop()
}

#[test]
fn the_smallest_writer_sets_the_size() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&[])?;
    let mut large = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    large.resize(40, 120)?;
    eventually("the larger window to count", TIMEOUT, || {
        large.send("clear; echo size-$(stty size)\r")?;
        std::thread::sleep(std::time::Duration::from_millis(200));
        Ok(large.screen().contains("size-40 120").then_some(()))
    })?;
    let small = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    eventually("the smaller window to count", TIMEOUT, || {
        large.send("clear; echo size-$(stty size)\r")?;
        std::thread::sleep(std::time::Duration::from_millis(200));
        Ok(large.screen().contains("size-24 80").then_some(()))
    })?;
    drop((large, small));
    system.stop()
}

#[test]
fn the_programs_end_is_the_attachs_end_with_its_code() -> Result<()> {
    let system = System::start()?;
    let weaver = system.new_weaver(&["--", "sh", "-c", "read line; echo got $line; exit 5"])?;
    let mut terminal = Terminal::spawn(&system.loom(&["attach", &weaver.id]))?;
    terminal.send("word\r")?;
    assert_eq!(terminal.wait(TIMEOUT)?.code(), Some(5));
    terminal.expect("got word", TIMEOUT)?;
    let described = eventually("the weaver to be Failed", TIMEOUT, || {
        let described = system.describe(&weaver)?;
        Ok((described["status"] == "Failed").then_some(described))
    })?;
    assert_eq!(described["exit_code"], 5);
    assert!(system.run(&["logs", &weaver.id])?.contains("got word"), "the output outlives the program");
    system.stop()
}
