//! Clones of real repositories, made with the installed `git`.

use super::*;

#[test]
fn names_come_from_the_end_of_the_url() {
    for (url, name) in [
        ("https://example.org/team/app.git", Some("app")),
        ("https://example.org/team/app/", Some("app")),
        ("https://user:password@example.org/app?x=1", Some("app")),
        ("file:///srv/git/my.project.git", Some("my.project")),
        ("https://example.org", None),
        ("https://example.org/", None),
        ("https://example.org/..", None),
        ("https://example.org/.git", None),
        ("https://example.org/a/-x", None),
        ("https://example.org/a b", None),
        ("example.org/app", None),
    ] {
        assert_eq!(directory_name(url), name, "{url}");
    }
}

#[test]
fn passwords_are_not_shown() {
    assert_eq!(without_credentials("https://user:password@example.org/app"), "https://example.org/app");
}

fn git(directory: &Path, arguments: &[&str]) {
    let status = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"])
        .args(arguments)
        .current_dir(directory)
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "git {arguments:?}");
}

/// A repository with a file on `main` and another one on `topic/one`.
fn source(root: &Path) -> String {
    let source = root.join("source");
    fs::create_dir(&source).unwrap();
    git(&source, &["init", "-q"]);
    fs::write(source.join("main.txt"), "main").unwrap();
    git(&source, &["add", "."]);
    git(&source, &["commit", "-q", "-m", "one"]);
    git(&source, &["checkout", "-q", "-b", "topic/one"]);
    fs::write(source.join("topic.txt"), "topic").unwrap();
    git(&source, &["add", "."]);
    git(&source, &["commit", "-q", "-m", "two"]);
    git(&source, &["checkout", "-q", "main"]);
    format!("file://{}", source.display())
}

fn clone(root: &Path, url: &str, branch: Option<&str>) -> Repository {
    let workspace = root.join("workspace");
    fs::create_dir_all(&workspace).unwrap();
    let file_repositories = vec![root.canonicalize().unwrap()];
    Repository { url: url.to_owned(), branch: branch.map(str::to_owned), workspace, file_repositories }
}

#[tokio::test]
async fn a_repository_is_cloned_whole() {
    let root = tempfile::tempdir().unwrap();
    let url = source(root.path());
    let clone = clone(root.path(), &url, None);
    let destination = clone.destination().unwrap();
    fs::create_dir(root.path().join("workspace/.source.cloning")).unwrap();
    clone.run().await.unwrap();
    assert_eq!(fs::read_to_string(destination.join("main.txt")).unwrap(), "main");
    assert!(!root.path().join("workspace/.source.cloning").exists());
    // `git` can work with the clone, and it has its remote.
    git(&destination, &["diff", "--exit-code", "HEAD"]);
    git(&destination, &["fetch", "-q", "origin"]);
    git(&destination, &["checkout", "-q", "topic/one"]);
}

#[tokio::test]
async fn a_branch_is_checked_out() {
    let root = tempfile::tempdir().unwrap();
    let url = source(root.path());
    clone(root.path(), &url, Some("topic/one")).run().await.unwrap();
    let head = fs::read_to_string(root.path().join("workspace/source/.git/HEAD")).unwrap();
    assert_eq!(head.trim(), "ref: refs/heads/topic/one");
    assert!(root.path().join("workspace/source/topic.txt").exists());
}

#[tokio::test]
async fn a_missing_branch_is_named() {
    let root = tempfile::tempdir().unwrap();
    let url = source(root.path());
    let error = clone(root.path(), &url, Some("nowhere")).run().await.unwrap_err().to_string();
    assert!(error.starts_with("the clone failed: ") && error.ends_with("has no branch nowhere"), "{error}");
    assert_eq!(fs::read_dir(root.path().join("workspace")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_missing_repository_is_named() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}/nothing", root.path().display());
    let error = clone(root.path(), &url, None).run().await.unwrap_err().to_string();
    assert!(error.contains("does not exist") && error.contains("/nothing"), "{error}");
}

#[tokio::test]
async fn a_repository_elsewhere_is_refused_also_behind_a_link() {
    let (root, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = source(elsewhere.path());
    std::os::unix::fs::symlink(elsewhere.path().join("source"), root.path().join("link")).unwrap();
    for url in [url, format!("file://{}/link", root.path().display())] {
        let error = clone(root.path(), &url, None).run().await.unwrap_err().to_string();
        assert!(error.contains("offers"), "{error}");
    }
}

#[test]
fn files_are_for_local_weavers_only() {
    let mut clone = clone(tempfile::tempdir().unwrap().path(), "file:///srv/app", None);
    assert!(clone.destination().is_ok());
    clone.file_repositories.clear();
    assert!(clone.destination().is_err());
    clone.url = "ssh://example.org/app".to_owned();
    assert!(clone.destination().is_err());
}
