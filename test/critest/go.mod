// critest, the tests of Kubernetes' Container Runtime Interface, among them those of its network. A module of its own, so
// that its dependencies do not decide the versions that other programs are built with.
module github.com/flanneld/flanneld/test/critest

go 1.26.6

tool sigs.k8s.io/cri-tools/cmd/critest

require sigs.k8s.io/cri-tools v1.37.0 // indirect
