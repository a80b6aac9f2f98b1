# One node: containerd, kubelet, kube-proxy and the imaginary GPU, in mount, network, cgroup, UTS and IPC namespaces of its own.

node_setup() { # N: what runs inside the new namespaces. cgroup v1 hosts need every controller mounted again, "systemd" too.
  local n=$1 dir=$state/node$1
  cat <<SETUP
hostname node$n
if [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
  controllers=\$(ls /sys/fs/cgroup | grep -v -E 'unified|systemd')
  umount -R /sys/fs/cgroup; mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  for c in \$controllers; do mkdir /sys/fs/cgroup/\$c; mount -t cgroup -o \$c cgroup /sys/fs/cgroup/\$c; mkdir -p /sys/fs/cgroup/\$c/ft-node$n; done
  mkdir /sys/fs/cgroup/systemd; mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd; mkdir -p /sys/fs/cgroup/systemd/ft-node$n
  for f in cpus mems; do cat /sys/fs/cgroup/cpuset/cpuset.\$f > /sys/fs/cgroup/cpuset/ft-node$n/cpuset.\$f; done
else
  mkdir -p /sys/fs/cgroup/ft-node$n
fi
for setting in vm/overcommit_memory=1 kernel/panic=10 kernel/panic_on_oops=1; do   # kubelet wants them: shown to it, not set on the host
  f=$dir/sysctl/\${setting%%=*}; mkdir -p \$(dirname \$f); echo \${setting##*=} > \$f; mount --bind \$f /proc/sys/\${setting%%=*}
done
mount -t tmpfs -o mode=755 tmpfs /run; mkdir -p /run/ft /run/netns
for d in /var/lib/kubelet /var/log/pods /var/log/containers /var/lib/cni; do mkdir -p \$d $dir\$d; mount --bind $dir\$d \$d; done
mount --make-rshared /var/lib/kubelet
SETUP
}

node_files() {
  local n=$1 dir=$state/node$1; mkdir -p "$dir/cni"
  cat > "$dir/cni/10-bridge.conflist" <<CNI
{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
 "ipam":{"type":"host-local","dataDir":"$dir/cni-data","ranges":[[{"subnet":"10.244.$n.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
CNI
  cat > "$dir/containerd.toml" <<TOML
version = 2
root = "$dir/containerd"
state = "/run/ft/containerd"
[grpc]
  address = "/run/ft/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$dir/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
TOML
  cat > "$dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /ft-node$n
failSwapOn: false
address: $(node_ip "$n")
healthzBindAddress: 127.0.0.1
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/ft/containerd.sock
makeIPTablesUtilChains: false
resolvConf: ""
evictionHard: {memory.available: "100Mi"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
nodeStatusUpdateFrequency: 2s
oomScoreAdj: 0
YAML
}

node() {
  local n=$1 nodes=$2 dir=$state/node$1 m labels gpu=nvidia.com/gpu
  labels=$gpu.memory=${gpu_memory[$n]},$gpu.product=${gpu_product[$n]},$gpu.count=1
  labels+=,$gpu.compute.major=${gpu_compute[$n]%.*},$gpu.compute.minor=${gpu_compute[$n]#*.}
  node_files "$n"
  holder "node$n" "-m -n -C -u -i --propagation private" "$(node_setup "$n")"; plug "node$n" "$(node_ip "$n")"
  ip route add "10.244.$n.0/24" via "$(node_ip "$n")"; $(in_cp) ip route add "10.244.$n.0/24" via "$(node_ip "$n")"
  for m in $(seq "$nodes"); do [ "$m" = "$n" ] || $(in_node "$n") ip route add "10.244.$m.0/24" via "$(node_ip "$m")"; done
  define "node$n-containerd" $(in_node "$n") containerd -c "$dir/containerd.toml"
  define "node$n-kubelet" $(in_node "$n") "$kube" kubelet --config="$dir/kubelet.yaml" --kubeconfig="$pki/node$n.kubeconfig" \
    --hostname-override="node$n" --node-ip="$(node_ip "$n")" --node-labels="$labels"
  define "node$n-fakegpu" $(in_node "$n") "$kube" fake-gpu --resource nvidia.com/gpu --count 1
  define "node$n-proxy" $(in_node "$n") "$kube" kube-proxy --kubeconfig="$pki/proxy.kubeconfig" --hostname-override="node$n" --proxy-mode=iptables \
    --cluster-cidr=10.244.0.0/16 --conntrack-max-per-core=0 --conntrack-min=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
  start "node$n-containerd"
  wait_for "node$n containerd" "node$n-containerd" 30 $(in_node "$n") ctr -a /run/ft/containerd.sock version
  local image; for image in "$cache"/images/*.tar; do load_on "$n" "$image"; done
  start "node$n-kubelet"; start "node$n-fakegpu"; start "node$n-proxy"
}

load_on() { $(in_node "$1") ctr -a /run/ft/containerd.sock -n k8s.io image import "$(realpath "$2")" >/dev/null || die "node$1 cannot import $2"; }

nodes_up() { ls "$state/run" | sed -n 's/^node\([0-9]*\)-ns.pid$/\1/p'; }

node_ready() {
  local n=$1
  wait_for "node$n Ready" "node$n-kubelet" 90 kubectl wait --for=condition=Ready "node/node$n" --timeout=1s
  wait_for "node$n offers nvidia.com/gpu" "node$n-fakegpu" 90 kubectl wait --for=jsonpath='{.status.allocatable.nvidia\.com/gpu}'=1 "node/node$n" --timeout=1s
}

# Containers are found by their cgroup, their shims by the node's mount namespace.
node_down() {
  local n=$1 holder mounts pid
  holder=$(cat "$state/run/node$n-ns.pid"); mounts=$(readlink "/proc/$holder/ns/mnt") || return 0
  for pid in $(nsenter -t "$holder" -m -C sh -c "find /sys/fs/cgroup -path '*ft-node$n*' -name cgroup.procs -exec cat {} + 2>/dev/null" | sort -u); do kill -9 "$pid" 2>/dev/null; done
  if [ "$mounts" != "$(readlink /proc/self/ns/mnt)" ]; then
    for pid in /proc/[0-9]*; do [ "${pid#/proc/}" != "$holder" ] && [ "$(readlink "$pid/ns/mnt" 2>/dev/null)" = "$mounts" ] && kill -9 "${pid#/proc/}"; done
  fi
  sleep 0.5
  nsenter -t "$holder" -m -C sh -c "find /sys/fs/cgroup -depth -type d -path '*ft-node$n*' -exec rmdir {} \\; 2>/dev/null"
  kill -9 "$holder"
}
