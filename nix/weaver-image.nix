# The official weaver image from nixpkgs: the same tools as weaver-image/packages, which stays the one list. The names
# below say what each Debian package is called here.
{ pkgs }:
let
  names = {
    bash-completion = [ "bash-completion" ];
    build-essential = [ "gcc" "binutils" ];
    ca-certificates = [ "cacert" ];
    curl = [ "curl" ];
    dnsutils = [ "dnsutils" ];
    file = [ "file" ];
    git = [ "git" ];
    iproute2 = [ "iproute2" ];
    iputils-ping = [ "iputils" ];
    jq = [ "jq" ];
    less = [ "less" ];
    lsof = [ "lsof" ];
    make = [ "gnumake" ];
    nano = [ "nano" ];
    netcat-openbsd = [ "netcat-openbsd" ];
    openssh-client = [ "openssh" ];
    postgresql-client = [ "postgresql" ];
    procps = [ "procps" ];
    psmisc = [ "psmisc" ];
    python3 = [ "python3" ];
    python3-venv = [ "virtualenv" ];
    ripgrep = [ "ripgrep" ];
    rsync = [ "rsync" ];
    sqlite3 = [ "sqlite" ];
    strace = [ "strace" ];
    tmux = [ "tmux" ];
    tree = [ "tree" ];
    unzip = [ "unzip" ];
    vim-tiny = [ "vim" ];
    xz-utils = [ "xz" ];
    zip = [ "zip" ];
  };
  # What Debian has anyway.
  essential = [ "bashInteractive" "coreutils" "diffutils" "findutils" "gnugrep" "gnused" "gnutar" "gzip" "gawk" "util-linux" "ncurses" ];

  isPackage = line: builtins.isString line && line != "" && builtins.substring 0 1 line != "#";
  listed = builtins.filter isPackage (builtins.split "\n" (builtins.readFile ../weaver-image/packages));
  named = package:
    names.${package} or (throw "weaver-image/packages has ${package}, and nix/weaver-image.nix has no name for it");
  contents = map (name: pkgs.${name}) (essential ++ builtins.concatMap named listed);
in
pkgs.dockerTools.buildLayeredImage {
  name = "loom/weaver";
  tag = "latest";
  inherit contents;
  # Whoever a pod runs as has a name, and a home.
  fakeRootCommands = ''
    mkdir -p etc home/loom workspace tmp
    echo 'root:x:0:0:root:/root:/bin/bash' > etc/passwd
    echo 'loom:x:1000:1000:loom:/home/loom:/bin/bash' >> etc/passwd
    echo 'root:x:0:' > etc/group
    echo 'loom:x:1000:' >> etc/group
    chown -R 1000:1000 home/loom workspace
    chmod 1777 tmp
  '';
  config = {
    Cmd = [ "/bin/bash" ];
    User = "1000:1000";
    WorkingDir = "/workspace";
    Env = [ "PATH=/bin:/usr/bin" "LANG=C.UTF-8" "SSL_CERT_FILE=/etc/ssl/certs/ca-bundle.crt" ];
  };
}
