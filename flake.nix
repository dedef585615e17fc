{
  description = "Loom weavers: short-lived places to work as pods";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" ];
      forEach = build:
        builtins.listToAttrs (map (system: { name = system; value = build nixpkgs.legacyPackages.${system}; }) systems);
    in
    {
      packages = forEach (pkgs: {
        weaver-image = import ./nix/weaver-image.nix { inherit pkgs; };
      });
    };
}
