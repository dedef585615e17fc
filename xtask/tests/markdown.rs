//! The repository's Markdown is wrapped, so that a change shows as the lines that it changes, and the threat model names
//! tests that exist.

use std::{
    fs,
    path::{Path, PathBuf},
};

const COLUMNS: usize = 120;

#[test]
fn markdown_prose_is_wrapped() {
    let mut files = Vec::new();
    markdown(root(), &mut files);
    assert!(!files.is_empty(), "no Markdown under {}", root().display());

    let long: Vec<String> = files
        .iter()
        .flat_map(|file| {
            let text = fs::read_to_string(file).expect("a readable file");
            long_lines(&text).map(|line| format!("{}:{line}", file.display())).collect::<Vec<_>>()
        })
        .collect();
    assert!(long.is_empty(), "longer than {COLUMNS} columns:\n{}", long.join("\n"));
}

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let text = fs::read_to_string(root().join("docs/security.md")).expect("the threat model");
    let (mut source, mut named) = (String::new(), 0);
    for line in text.lines().filter(|line| line.starts_with('|')) {
        let Some(cell) = line.split('|').rev().nth(1) else { continue };
        // Every second piece stands between backticks: a file, and then the names of its tests.
        for word in cell.split('`').skip(1).step_by(2) {
            if word.ends_with(".rs") {
                source = fs::read_to_string(root().join(word)).unwrap_or_else(|error| panic!("{word}: {error}"));
            } else {
                assert!(source.contains(&format!("fn {word}(")), "there is no test {word}: {line}");
                named += 1;
            }
        }
    }
    assert!(named > 0, "no test is named");
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the workspace")
}

/// The numbers of the lines that are too long. Tables and code blocks cannot be wrapped.
fn long_lines(text: &str) -> impl Iterator<Item = usize> {
    let mut code = false;
    text.lines().zip(1..).filter_map(move |(line, number)| {
        code ^= line.trim_start().starts_with("```");
        let wraps = !code && !line.trim_start().starts_with('|');
        (wraps && line.chars().count() > COLUMNS).then_some(number)
    })
}

fn markdown(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a readable directory") {
        let entry = entry.expect("a readable directory");
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if entry.file_type().expect("a file type").is_dir() {
            if name != "target" && !name.starts_with('.') {
                markdown(&entry.path(), files);
            }
        } else if name.ends_with(".md") {
            files.push(entry.path());
        }
    }
}
