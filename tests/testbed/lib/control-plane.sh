# etcd, kube-apiserver, kube-controller-manager and kube-scheduler. APISERVER_FLAGS and KCM_FLAGS add flags.

control_plane() {
  holder cp -n true; plug cp $cp_ip
  define etcd $(in_cp) "$kube" etcd --data-dir "$state/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380
  define kube-apiserver $(in_cp) "$kube" kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
    --advertise-address=$cp_ip --bind-address=0.0.0.0 --secure-port=6443 --service-cluster-ip-range=10.96.0.0/16 \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
    --requestheader-client-ca-file="$pki/ca.crt" --requestheader-allowed-names=front-proxy --requestheader-username-headers=X-Remote-User \
    --requestheader-group-headers=X-Remote-Group --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$pki/proxy-client.crt" --proxy-client-key-file="$pki/proxy-client.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" \
    --kubelet-client-certificate="$pki/kubelet-client.crt" --kubelet-client-key="$pki/kubelet-client.key" --kubelet-preferred-address-types=InternalIP \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true --enable-aggregator-routing=true ${APISERVER_FLAGS:-}
  define kcm $(in_cp) "$kube" kube-controller-manager --kubeconfig="$pki/kcm.kubeconfig" --leader-elect=false --use-service-account-credentials \
    --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key" \
    --bind-address=127.0.0.1 --authentication-kubeconfig="$pki/kcm.kubeconfig" --authorization-kubeconfig="$pki/kcm.kubeconfig" ${KCM_FLAGS:-}
  define scheduler $(in_cp) "$kube" kube-scheduler --kubeconfig="$pki/scheduler.kubeconfig" --leader-elect=false --bind-address=127.0.0.1 \
    --authentication-kubeconfig="$pki/scheduler.kubeconfig" --authorization-kubeconfig="$pki/scheduler.kubeconfig"
  start etcd; start kube-apiserver
  wait_for "kube-apiserver /readyz" kube-apiserver 90 kubectl get --raw /readyz
  start kcm; start scheduler
  wait_for "default ServiceAccount" kcm 90 kubectl -n default get serviceaccount default
}
