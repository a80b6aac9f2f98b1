# Paths, versions and addresses of the test cluster; sourced by `cluster`.
cache=${CLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/finetune-operator/cluster}   # binaries and images: keep
state=${CLUSTER_STATE:-/var/tmp/finetune-operator-cluster}                         # a running cluster: `down` deletes it
kube_version=v1.36.2 kueue_version=v0.15.0 helm_version=v4.3.1 monitoring_version=v0.85.0 go_version=1.26
kube=$cache/kubeall
pki=$state/pki
export KUBECONFIG=$pki/admin.kubeconfig

bridge=ftbr0 host_ip=10.99.0.1 cp_ip=10.99.0.10
node_ip() { echo "10.99.0.1$1"; }
gpu_memory=(0 15360 24576 81559)   # MiB, as GPU feature discovery labels them; index 0 is unused
gpu_compute=(none 7.5 8.6 9.0)
gpu_product=(none Tesla-T4 NVIDIA-A10G NVIDIA-H100-80GB-HBM3)

began=$(date +%s%N)
note() { printf '%-40s %6d ms\n' "$1" $((($(date +%s%N) - began) / 1000000)); }
die() { echo "cluster: $*" >&2; exit 1; }
kubectl() { "$kube" kubectl "$@"; }
