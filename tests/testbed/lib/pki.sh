# The cluster's certificate authority, server and client certificates, and a kubeconfig for each client.

certificates() {
  local nodes=$1; mkdir -p "$pki"; cd "$pki" || die "no $pki"
  local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  openssl req -x509 "${key[@]}" -keyout ca.key -out ca.crt -days 3650 -subj /CN=cluster-ca
  openssl genrsa -out sa.key 2048; openssl rsa -in sa.key -pubout -out sa.pub
  certificate() { # FILE SUBJECT EXTENSIONS
    openssl req "${key[@]}" -keyout "$1.key" -out "$1.csr" -subj "$2"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -out "$1.crt" -days 3650 -extfile <(echo "$3")
  }
  user() { # FILE SUBJECT: a client certificate and a kubeconfig
    certificate "$1" "$2" extendedKeyUsage=clientAuth
    local config="--kubeconfig=$1.kubeconfig"
    kubectl config "$config" set-cluster local --server=https://$cp_ip:6443 --certificate-authority=ca.crt --embed-certs
    kubectl config "$config" set-credentials user --client-certificate="$1.crt" --client-key="$1.key" --embed-certs
    kubectl config "$config" set-context local --cluster=local --user=user; kubectl config "$config" use-context local
  }
  certificate apiserver /CN=kube-apiserver "extendedKeyUsage=serverAuth
subjectAltName=IP:127.0.0.1,IP:$cp_ip,IP:10.96.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
  certificate kubelet-client /O=system:masters/CN=apiserver-kubelet-client extendedKeyUsage=clientAuth
  certificate proxy-client /CN=front-proxy extendedKeyUsage=clientAuth
  user admin /O=system:masters/CN=admin
  user kcm /CN=system:kube-controller-manager
  user scheduler /CN=system:kube-scheduler
  user proxy /CN=system:kube-proxy
  local n; for n in $(seq "$nodes"); do user "node$n" "/O=system:nodes/CN=system:node:node$n"; done
}
