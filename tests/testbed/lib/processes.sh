# Processes of the cluster (one file each in run/, cmd/ and log/) and the namespaces they live in.

define() { local name=$1; shift; printf '%s\n' "$@" > "$state/cmd/$name"; }   # one argument a line
start() {
  local command; mapfile -t command < "$state/cmd/$1"
  nohup setsid "${command[@]}" >> "$state/log/$1.log" 2>&1 < /dev/null &
  echo $! > "$state/run/$1.pid"
}
stop() { [ -e "$state/run/$1.pid" ] || die "no process $1"; kill -9 "$(cat "$state/run/$1.pid")" 2>/dev/null; }
alive() { kill -0 "$(cat "$state/run/$1.pid")" 2>/dev/null; }

# wait_for LABEL PROCESS SECONDS COMMAND...: until COMMAND succeeds; fails at once if PROCESS dies.
wait_for() {
  local label=$1 process=$2 tries=$(($3 * 5)); shift 3
  while ! "$@" >/dev/null 2>&1; do
    alive "$process" || { tail -n 5 "$state/log/$process.log" | cut -c1-600 >&2; die "$process died"; }
    ((tries-- > 0)) || die "$label: timed out"
    sleep 0.2
  done
  note "$label"
}

# holder NAME UNSHARE_FLAGS SCRIPT: a process that keeps new namespaces alive after SCRIPT has set them up.
holder() {
  printf 'set -e\n%s\ntouch %q\nexec sleep infinity\n' "$3" "$state/run/$1.ready" > "$state/setup-$1.sh"
  define "$1-ns" unshare $2 bash "$state/setup-$1.sh"
  start "$1-ns"
  wait_for "$1 namespaces" "$1-ns" 20 test -e "$state/run/$1.ready"
}
in_cp() { echo nsenter -t "$(cat "$state/run/cp-ns.pid")" -n --; }
in_node() { echo nsenter -t "$(cat "$state/run/node$1-ns.pid")" -m -n -C -u -i --wd=/ --; }

# plug NAME ADDRESS: a cable from NAME's network namespace to the bridge.
plug() {
  local pid; pid=$(cat "$state/run/$1-ns.pid")
  ip link add "ft-$1" type veth peer name eth0 netns "$pid" && ip link set "ft-$1" master $bridge up
  nsenter -t "$pid" -n sh -c "ip link set lo up && ip addr add $2/24 dev eth0 && ip link set eth0 up && ip route add default via $host_ip && echo 1 > /proc/sys/net/ipv4/ip_forward"
}
