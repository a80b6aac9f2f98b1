# The CRDs of the Prometheus operator, out of its Go module: the schema that ServiceMonitor, PodMonitor and PrometheusRule must satisfy.

monitoring_crds() { # prints the folder
  go_tool
  local folder
  folder=$(cd / && "$go" mod download -json "github.com/prometheus-operator/prometheus-operator@$monitoring_version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
  [ -d "$folder/example/prometheus-operator-crd" ] || die "no CRDs of the Prometheus operator"
  echo "$folder/example/prometheus-operator-crd"
}
