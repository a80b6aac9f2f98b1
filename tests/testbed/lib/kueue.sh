# Kueue, compiled from its Go module and installed with the Helm chart of the same module.

kueue_image=$cache/kueue-$kueue_version.tar

build_kueue() {
  [ -e "$kueue_image" ] && return
  go_tool
  local root; root=$(mktemp -d); mkdir -m 1777 "$root/tmp"
  (cd "$here/kueue" && CGO_ENABLED=0 "$go" build -buildvcs=false -trimpath -ldflags "-s -w" -o "$root/manager" sigs.k8s.io/kueue/cmd/kueue) || die "go build failed"
  python3 "$here/image.py" "$kueue_image" localhost/kueue:$kueue_version "$root" --entrypoint '["/manager"]' --user 65532 || die "no Kueue image"
  rm -rf "$root"
  note "kueue $kueue_version"
}

install_kueue() {
  go_tool; helm_tool; build_kueue
  local n chart; chart=$(cd "$here/kueue" && "$go" list -m -f '{{.Dir}}' sigs.k8s.io/kueue)/charts/kueue || die "no Kueue module"
  for n in $(nodes_up); do load_on "$n" "$kueue_image"; done
  local image=controllerManager.manager.image
  "$cache/helm" upgrade --install kueue "$chart" -n kueue-system --create-namespace \
    --set $image.repository=localhost/kueue,$image.tag=$kueue_version,$image.pullPolicy=Never \
    --set controllerManager.manager.resources.requests.cpu=50m >/dev/null || die "helm failed"
  kubectl -n kueue-system rollout status deployment/kueue-controller-manager --timeout=180s >/dev/null || die "Kueue does not start"
  local tries=60   # its pod is ready before its webhooks have their certificates
  until kubectl create --dry-run=server -f - >/dev/null 2>&1 <<< '{"apiVersion":"kueue.x-k8s.io/v1beta2","kind":"ResourceFlavor","metadata":{"name":"probe"}}'; do
    ((tries-- > 0)) || die "Kueue's webhooks do not answer"; sleep 1
  done
  note "Kueue admits"
}
