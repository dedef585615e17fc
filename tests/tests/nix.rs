//! The flake, as far as it can be shown without nixpkgs: it parses, and evaluates against a stub of it.

use std::{path::Path, process::Command};

use anyhow::{Result, ensure};

/// Every package is its own name, and an image is what it was asked to be.
const STUB: &str = r#"
  let
    root = ROOT;
    file = builtins.readFile (root + "/nix/weaver-image.nix");
    quoted = builtins.filter builtins.isList (builtins.split "\"([A-Za-z0-9-]+)\"" file);
    packages = builtins.listToAttrs (map (match: { name = builtins.head match; value = builtins.head match; }) quoted);
    pkgs = packages // { dockerTools.buildLayeredImage = image: image; };
    nixpkgs.legacyPackages = { x86_64-linux = pkgs; aarch64-linux = pkgs; };
    outputs = (import (root + "/flake.nix")).outputs { self = { }; inherit nixpkgs; };
  in outputs.packages.x86_64-linux.weaver-image
"#;

#[test]
fn the_flake_makes_an_image_of_the_listed_packages() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let output = Command::new("nix-instantiate")
        .args(["--store", "dummy://", "--eval", "--strict", "--json", "--expr"])
        .arg(STUB.replace("ROOT", &root.to_string_lossy()))
        .env("HOME", tempfile::tempdir()?.path())
        .output()?;
    ensure!(output.status.success(), "nix: {}", String::from_utf8_lossy(&output.stderr));
    let image: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(image["config"]["Cmd"], serde_json::json!(["/bin/bash"]));
    let contents = image["contents"].to_string();
    for package in ["git", "ripgrep", "gcc", "bashInteractive"] {
        assert!(contents.contains(&format!("\"{package}\"")), "no {package} in {contents}");
    }
    Ok(())
}
