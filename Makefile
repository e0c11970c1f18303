# Builds, checks and tests everything. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

STATICCHECK_VERSION := v0.8.2
GOVULNCHECK_VERSION := v1.9.0
# For each fuzz target: a count, since a time that runs out while the machine is
# busy is now and then reported as a failure (context deadline exceeded).
FUZZTIME ?= 5000x
TESTFLAGS ?=# such as -v or -run=TestRestart

# Programs that a target needs besides Go, each with the package that has it on Debian and the like.
programs-lab := ip:iproute2 iptables:iptables nft:nftables ping:iputils-ping
programs-demo := $(programs-lab) iperf3:iperf3
programs-image := dockerd:docker.io mmdebstrap:mmdebstrap
programs-demo-kube := $(programs-lab) $(programs-image) containerd:containerd runc:runc conntrack:conntrack
programs-conformance := $(programs-demo-kube)
programs-e2e := $(programs-demo-kube) iperf3:iperf3 tcpdump:tcpdump ethtool:ethtool wg:wireguard-tools \
	systemd-analyze:systemd promtool:prometheus
programs-vm := qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap
programs-tools := $(programs-e2e) $(programs-vm)
NEED := $(addprefix need-,lab demo image demo-kube conformance e2e vm tools)
INSTALL := $(NEED:need-%=install-%)

export PATH := $(PATH):/usr/sbin:/sbin
# The same flags everywhere, so that a package is compiled once for the binaries, vet and tests, and not again in another
# clone (-trimpath). The version comes from git describe below; git may refuse to serve root. Without the tag, gRPC's
# tracing keeps the linker from leaving out what is unused.
export GOFLAGS := $(GOFLAGS) -buildvcs=false -trimpath -tags=grpcnotrace
export CGO_ENABLED := 0

BINARIES := $(patsubst cmd/%/main.go,build/bin/%,$(wildcard cmd/*/main.go))
SOURCES := $(shell find . -path ./test -prune -o -path ./build -prune -o -path ./.git -prune -o \
	-type f -not -name '*_test.go' -print)
# The image that the manifest names, unless told otherwise.
IMAGE ?= $(shell awk '$$1 == "image:" { print $$2; exit }' Documentation/kube-flannel.yml)$(SUFFIX)
ARCH ?= $(shell go env GOARCH)
BASE ?=# an image with iptables and nft; none: made of Debian's packages
VARIANT ?=# full: the image also has a shell, and the programs that the backends extension and ipsec run
SUFFIX := $(addprefix -,$(VARIANT))
ETCD := build/bin/etcd build/bin/etcdctl
# Older servers, which answer differently.
OLD_ETCD := build/stores/etcd-3.4 build/stores/etcd-3.6
CNI := $(addprefix build/cni/,bridge host-local loopback portmap)
CNITOOL := build/bin/cnitool
# What else Kubernetes may be: an older API server, and kine in the place of etcd.
OTHER_KUBE := build/stores/kube-apiserver-1.34 build/stores/kine
KUBE := $(addprefix build/kube/,kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl)
# Kubernetes' own tests, and what runs in the pods that they make.
SUITE := $(addprefix build/conformance/,e2e.test ginkgo agnhost regression-issue-74839 localhost.crt localhost.key \
	coredns critest)
# What the chart deploys with netpol.enabled.
NETPOL := build/kube/netpol
# What clusters have beside flannel, for test-long.
METALLB := $(addprefix build/metallb/,speaker controller crd)
NEIGHBOURS := build/cni/multus $(METALLB)

.PHONY: help build image image-full manifest docs release release-check tools check check-source vulncheck test unit \
	fuzz e2e test-all test-stores test-clusters test-long test-race test-vm bench bench-faults bench-fleet bench-kube \
	bench-udp demo demo-kube demo-down conformance conformance-quick clean FORCE $(NEED) $(INSTALL)
.NOTPARALLEL: # the go tool uses all processors itself

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-17s %s\n", $$1, $$2 }' Makefile

build: $(BINARIES) ## Build the static binaries into build/bin

$(BINARIES): build/bin/%: $(SOURCES) build/version
	go build -ldflags "-s -w -X main.version=$$(cat build/version)" -o $@ ./cmd/$*

# Rewritten only when the version has changed.
build/version: FORCE
	@mkdir -p build
	@version=$$(git describe --tags --always --dirty 2>/dev/null || echo unknown); \
	[ "$$version" = "$$(cat $@ 2>/dev/null)" ] || echo "$$version" > $@

build/image/bin/$(ARCH)/%: $(SOURCES) build/version
	GOARCH=$(ARCH) go build -ldflags "-s -w -X main.version=$$(cat build/version)" -o $@ ./cmd/$*

# The files of some packages and of what they depend on, and nothing to run them
# with. For any architecture: none of them is executed.
packages := iptables nftables
packages-full := $(packages) dash coreutils grep sed iproute2 wireguard-tools \
	strongswan-charon strongswan-swanctl libstrongswan-standard-plugins
build/image/base-$(ARCH)$(SUFFIX).tar: Makefile
	@mkdir -p $(@D)
	SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --architectures=$(ARCH) --variant=extract \
		--include="$(packages$(SUFFIX))" --skip=output/dev \
		--extract-hook='rm -rf "$$1"/usr/share/[!x]* "$$1"/usr/lib/*/gconv "$$1"/etc/hostname' \
		--extract-hook='[ -z "$(VARIANT)" ] || { mkdir -p "$$1"/run; ln -s ../run "$$1"/var/run; }' bookworm $@

# The certificates of Mozilla's list, in one file: the package makes it when it is configured, which does not happen
# here.
build/image/ca-certificates.crt: Makefile
	@mkdir -p $(@D)
	mmdebstrap --quiet --variant=extract --include=ca-certificates --format=null --skip=output/dev \
		--extract-hook='cat "$$1"/usr/share/ca-certificates/mozilla/*.crt >"$(CURDIR)/$@"' bookworm

build/image/flannel-$(ARCH)$(SUFFIX).tar: Dockerfile Documentation/kube-flannel.yml dist/image/files \
	dist/mk-docker-opts.sh build/image/ca-certificates.crt $(if $(BASE),,build/image/base-$(ARCH)$(SUFFIX).tar) \
	$(addprefix build/image/bin/$(ARCH)/,flanneld flannel flannelctl)
	dist/image/files build/image/bin/$(ARCH) build/image/ca-certificates.crt build/image/files/$(ARCH)
	@dist/image/with-docker bash -euxc '\
		export DOCKER_BUILDKIT=1; \
		base=$(BASE); [ "$$base" ] || { base=flannel-base:$(ARCH)$(SUFFIX); \
			echo -e "FROM scratch\nADD base-$(ARCH)$(SUFFIX).tar /" | \
			docker build --platform linux/$(ARCH) --tag $$base --file - build/image; }; \
		docker build --platform linux/$(ARCH) --build-arg BASE=$$base --build-arg TARGETARCH=$(ARCH) --tag $(IMAGE) \
			--file Dockerfile build/image/files; \
		docker save --output $@ $(IMAGE)'

image: need-image build/image/flannel-$(ARCH)$(SUFFIX).tar ## An image: IMAGE=name ARCH=arm64 BASE=image VARIANT=full

image-full: ## The larger image, with VARIANT=full
	@$(MAKE) --no-print-directory image VARIANT=full

BUILT := build/bin/staticcheck build/bin/helm build/debian $(ETCD) $(OLD_ETCD) $(CNI) $(CNITOOL) $(KUBE) $(NETPOL) \
	$(OTHER_KUBE) $(SUITE) build/conformance/root.tar
tools: install-tools $(BUILT) ## Install what checks and tests need

# need-X fails where a program of X is missing. install-X installs the program first, where apt-get is.
MISSING = $$(for p in $(programs-$*); do command -v "$${p%:*}" >/dev/null || echo "$$p"; done)

$(NEED): need-%:
	@missing="$(MISSING)"; [ -z "$$missing" ] || { \
		echo "missing programs:" $$(sed 's/:.*//' <<<"$$missing"); \
		echo "run make tools, or install these packages:" $$(sed 's/.*://' <<<"$$missing"); \
		exit 1; \
	} >&2

$(INSTALL): install-%:
	@missing="$(MISSING)"; [ -z "$$missing" ] || ! command -v apt-get >/dev/null || { \
		apt-get update && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$(sed 's/.*://' <<<"$$missing"); \
	} || true
	@$(MAKE) --no-print-directory need-$*

build/bin/staticcheck: Makefile
	GOBIN="$(CURDIR)/build/bin" go install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION)
	@touch $@

# The real etcd, CNI plugins and cnitool, of the versions in test/go.mod.
build/bin/etcd: package = go.etcd.io/etcd/server/v3
build/bin/etcdctl: package = go.etcd.io/etcd/etcdctl/v3
$(CNITOOL): package = github.com/containernetworking/cni/cnitool
build/cni/bridge build/cni/loopback: package = github.com/containernetworking/plugins/plugins/main/$(@F)
build/cni/host-local: package = github.com/containernetworking/plugins/plugins/ipam/$(@F)
build/cni/portmap: package = github.com/containernetworking/plugins/plugins/meta/$(@F)
$(ETCD) $(CNI) $(CNITOOL): test/go.mod
	cd test && go build -ldflags "-s -w" -o "$(CURDIR)/$@" $(package)
	@touch $@

# The oldest etcd that people run, out of Debian 12's package, whatever system
# this machine has. Nothing is installed, and no service started.
build/stores/etcd-3.4:
	@mkdir -p $(@D)
	mmdebstrap --quiet --variant=extract --include=etcd-server --format=null --skip=output/dev \
		--extract-hook='cp "$$1/usr/bin/etcd" "$(CURDIR)/$@"' bookworm

build/stores/etcd-3.6: test/stores/etcd-3.6/go.mod
	@mkdir -p $(@D)
	cd test/stores/etcd-3.6 && go build -ldflags "-s -w" -o "$(CURDIR)/$@" go.etcd.io/etcd/server/v3
	@touch $@

build/bin/helm: test/helm/go.mod
	cd test/helm && go build -ldflags "-s -w" -o "$(CURDIR)/$@" helm.sh/helm/v4/cmd/helm
	@touch $@

# What manages networks and firewalls on hosts: Debian 12's programs, in a system of their own, which only nodes of
# the lab run. Nothing is installed on this machine, and no service started.
build/debian: test/lab/debian.packages
	@mkdir -p build
	rm -rf $@ $@.new
	mmdebstrap --quiet --variant=essential --format=directory --include="$$(paste -sd, $<)" --skip=output/dev \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' bookworm $@.new
	rm -rf --one-file-system $@.new/dev/*
	touch $@.new
	mv $@.new $@

# A real control plane and node, and an older API server; some minutes, once. They
# ask for their version.
$(KUBE): test/kubernetes/go.mod
build/stores/kube-apiserver-1.34: test/stores/kubernetes-1.34/go.mod
$(KUBE): program = $(@F)
build/stores/kube-apiserver-1.34: program = kube-apiserver
$(KUBE) build/stores/kube-apiserver-1.34:
	cd $(<D) && version=$$(awk '$$1 == "k8s.io/kubernetes" { print $$2 }' go.mod) && \
	go build -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$$version" -o "$(CURDIR)/$@" \
		k8s.io/kubernetes/cmd/$(program)
	@touch $@

build/conformance/e2e.test: test/kubernetes/go.mod
	@mkdir -p $(@D)
	cd test/kubernetes && version=$$(awk '$$1 == "k8s.io/kubernetes" { print $$2 }' go.mod) && \
	go test -c -vet=off -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$$version" -o "$(CURDIR)/$@" \
		k8s.io/kubernetes/test/e2e
	@touch $@

build/conformance/critest: test/critest/go.mod
	@mkdir -p $(@D)
	cd $(<D) && go test -c -vet=off -ldflags "-s -w" -o "$(CURDIR)/$@" sigs.k8s.io/cri-tools/cmd/critest
	@touch $@

build/conformance/ginkgo: package = github.com/onsi/ginkgo/v2/ginkgo
build/conformance/agnhost build/conformance/regression-issue-74839: package = k8s.io/kubernetes/test/images/$(@F)
build/conformance/coredns: package = .
FROM_KUBERNETES := $(addprefix build/conformance/,ginkgo agnhost regression-issue-74839)
$(FROM_KUBERNETES): test/kubernetes/go.mod
build/conformance/coredns: test/coredns/go.mod test/coredns/main.go
$(FROM_KUBERNETES) build/conformance/coredns:
	@mkdir -p $(@D)
	cd $(<D) && go build -ldflags "-s -w" -o "$(CURDIR)/$@" $(package)
	@touch $@

# A certificate and its key, which a server of agnhost reads.
build/conformance/localhost.crt build/conformance/localhost.key: test/kubernetes/go.mod
	@mkdir -p $(@D)
	cd test/kubernetes && install -m 644 "$$(go list -m -f '{{.Dir}}' k8s.io/kubernetes)/test/images/agnhost/porter/$(@F)" \
		"$(CURDIR)/$@"

# The root file system of the pods: what Kubernetes' tests call in them, such as sh, curl, dig, nc, ip and conntrack.
build/conformance/root.tar: test/cmd/conformance/debian.packages
	@mkdir -p $(@D)
	mmdebstrap --quiet --variant=essential --include="$$(paste -sd, $<)" --skip=output/dev \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' bookworm $@

# Under the name that it has in its own image.
$(NETPOL): test/netpol/go.mod
	@mkdir -p $(@D)
	cd $(<D) && go build -ldflags "-s -w" -o "$(CURDIR)/$@" sigs.k8s.io/kube-network-policies/cmd
	@touch $@

build/cni/multus: test/multus/go.mod
	@mkdir -p $(@D)
	cd $(<D) && go build -ldflags "-s -w" -o "$(CURDIR)/$@" gopkg.in/k8snetworkplumbingwg/multus-cni.v4/cmd/multus
	@touch $@

$(filter-out %/crd,$(METALLB)): test/metallb/go.mod
	@mkdir -p $(@D)
	cd $(<D) && go build -ldflags "-s -w" -o "$(CURDIR)/$@" go.universe.tf/metallb/$(@F)
	@touch $@

# Its definitions of objects.
build/metallb/crd: test/metallb/go.mod
	@mkdir -p $@
	cd $(<D) && install -m 644 "$$(go list -m -f '{{.Dir}}' go.universe.tf/metallb)"/config/crd/bases/* "$(CURDIR)/$@"
	@touch $@

# With SQLite as Go code: no C compiler is needed.
build/stores/kine: test/stores/kine/go.mod
	cd $(<D) && go build -ldflags "-s -w" -o "$(CURDIR)/$@" github.com/k3s-io/kine
	@touch $@

# The manifests are the chart with its default values, in two namespaces. Each has the selector of the DaemonSet that
# flannel's manifests make in that namespace, since a selector cannot change.
MANIFESTS := kube-flannel kube-flannel-kube-system
kube-flannel := --namespace kube-flannel --set createNamespace=true,flannel.selectorLabels.k8s-app=flannel
kube-flannel-kube-system := --namespace kube-system --set flannel.selectorLabels.tier=node
MANIFEST = { echo "\# The pod network, for kubectl apply. Made by make manifest from chart/flannel:"; \
	echo "\# the same with other settings comes from helm template. Network is what"; \
	echo "\# kube-controller-manager has as --cluster-cidr."; \
	build/bin/helm template flannel chart/flannel $($(1)) --set restartOnChange=false | \
	sed '/^\# Source: /d; /^$$/d'; } $(2)

manifest: build/bin/helm ## Write Documentation/kube-flannel*.yml from the chart
	$(foreach m,$(MANIFESTS),$(call MANIFEST,$m,>$@.new) && mv $@.new Documentation/$m.yml &&) true

# What pages tell of flags, keys and metrics, and the packages that have them.
REFERENCE = -run '^TestReference$$' \
	$(addprefix ./,$(sort $(dir $(shell grep -rl 'func TestReference' --include=*_test.go cmd network subnet backend))))

# One package at a time: two of them write into the same page.
docs: ## Write the tables of flags, keys and metrics in the documentation
	go test -count=1 -p=1 $(REFERENCE) -update

# The same sources, version and Go make the same bytes.
release: build/version ## Archives for all architectures, checksums, a bill of materials: in build/release
	VERSION=$$(cat build/version) SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) dist/release build/release

release-check: build/version ## A release of what is committed, made twice from nothing and compared; takes long
	VERSION=$$(cat build/version) SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) dist/release-check

vulncheck: ## Known vulnerabilities in what we call; asks vuln.go.dev
	go run golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION) ./...

check: check-source ## Formatting, vet, staticcheck, go.mod; licences; pages that say what the code does
	go test $(REFERENCE)

# All of check but the pages, which unit checks as well.
check-source: build/bin/staticcheck build/bin/helm
	@unformatted=$$(gofmt -l .); \
	[ -z "$$unformatted" ] || { echo "run gofmt -w on:"; echo "$$unformatted"; exit 1; }
	@for module in . test; do \
		(cd $$module && set -x && go vet ./... && "$(CURDIR)/build/bin/staticcheck" ./... && go mod tidy -diff); \
	done
	GOARCH=arm go vet ./pkg/... ./backend/udp ./backend/vxlan # where words of 32 bits matter
	@for cloud in awsvpc:aws-sdk-go gce:google.golang.org/api alivpc:aliyun tencentvpc:tencentcloud; do \
		! go list -deps -tags=no_$${cloud%:*} ./cmd/... | grep $${cloud#*:} || \
			{ echo "the tag no_$${cloud%:*} leaves this in"; exit 1; }; \
	done
	cd test && go build -o ../build/bin/bill ./cmd/bill
	build/bin/bill check
	build/bin/helm lint --quiet --strict chart/flannel
	@$(foreach m,$(MANIFESTS),diff -u Documentation/$m.yml <($(call MANIFEST,$m)) &&) true || \
		{ echo "the chart has changed: run make manifest"; exit 1; }

test: check-source unit e2e ## Check, unit and end-to-end tests (root)

test-all: check-source fuzz unit e2e test-race test-clusters conformance-quick test-long ## All that .ci/run runs, and all cases of all tests
	LONG=all $(MAKE) test-vm

# check vets all packages. Without debug information the linker takes half of the time.
GO_TEST := go test -vet=off -ldflags=-w
# The race detector needs cgo, and that a C compiler.
RACE_TEST := $(if $(shell command -v gcc),CGO_ENABLED=1 $(GO_TEST) -race,$(GO_TEST))

unit: ## Unit and in-namespace tests of the main module; what lacks root or a program is skipped
	$(RACE_TEST) -p=4 $(TESTFLAGS) ./pkg/firewall ./pkg/kernel ./... # the longest first; many tests wait

fuzz: ## Each fuzz target for FUZZTIME
	@grep -r --include=*_test.go '^func Fuzz' . | sed -E 's|^(.*)/[^/]*:func (Fuzz[A-Za-z0-9_]*).*|\1 \2|' | \
	while read -r package name; do \
		echo "go test -fuzz $$name -fuzztime $(FUZZTIME) $$package"; \
		go test -vet=off -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x "$$package"; \
	done

# The results do not come from the test cache, which does not know that the binaries have changed. Tests wait most of
# the time: four of e2e run at a time, beside another package. The race detector is for packages whose tests call our
# code, and left to test-race: our programs run in processes of their own, without it.
E2E = -count=1 -p=2 -parallel=4 -timeout=30m $(TESTFLAGS)

SERVERS := $(ETCD) build/stores/etcd-3.4 $(CNI) $(CNITOOL) $(KUBE) $(OTHER_KUBE) build/conformance/coredns
e2e: build need-e2e $(SERVERS) $(NETPOL) build/bin/helm build/debian image ## End-to-end tests in the lab
	cd test && $(GO_TEST) $(E2E) ./e2e ./stores ./... # the longest first

test-stores: build need-lab $(SERVERS) $(OLD_ETCD) ## Every version of etcd and Kubernetes that is tested
	cd test && LONG=all $(GO_TEST) $(E2E) ./stores ./etcd

LONG_TEST = cd test && LONG=rest $(GO_TEST) $(E2E) -run
LONG_TEST_NEEDS := build need-e2e $(SERVERS) $(OLD_ETCD) $(NETPOL) build/bin/helm build/debian image image-full
test-clusters: $(LONG_TEST_NEEDS) ## Whole clusters from the manifest and the chart
	$(LONG_TEST) '^Test(Cluster|FullImage|HelmCluster|Image|NetworkPolicy)$$' ./e2e

test-long: $(LONG_TEST_NEEDS) $(NEIGHBOURS) ## What else test leaves out of e2e: combinations, faults, neighbours, manifests of others
	$(LONG_TEST) '^Test(AnnouncedPods|Cleanup|DoctorTunnels|Egress|Faults|HostileRecords|Matrix|MetalLB|Migrate|Multus|Neighbours|OtherManifests|Reconfigure|Restart|SetImage)$$' ./e2e

test-race: build need-lab $(SERVERS) $(OLD_ETCD) ## What test leaves out of the stores' tests, with the race detector
	cd test && LONG=rest $(RACE_TEST) $(E2E) ./etcd ./cloud
	cd test && LONG=rest $(GO_TEST) $(E2E) -run '^TestStores$$' ./stores

# The kernel, and what tests run, from Debian's packages. Some 100 MB, once.
build/vm/root.cpio: test/vm/root
	@mkdir -p $(@D)
	test/vm/root $(@D)

test-vm: build need-vm $(ETCD) $(CNI) $(NETPOL) build/vm/root.cpio ## Some of the tests in a VM, on a kernel with more modules
	test/vm/run

demo: build install-demo $(ETCD) $(CNI) ## A cluster to look at: NODES=3 BACKEND=vxlan IPV6=1 NFTABLES=1 KEEP=1
	@cd test && go run ./cmd/demo

bench: build need-lab $(ETCD) ## One node among up to 20000, beside what ip and bridge need: BENCH="-runs 0" is how soon it is ready
	@cd test && go run ./cmd/bench $(BENCH)

bench-faults: build need-lab $(ETCD) $(CNI) ## How long pods are silent after each kind of fault
	cd test && go test -run '^$$' -bench '^BenchmarkFaults$$' -benchtime 3x -timeout 60m ./e2e

bench-fleet: need-lab $(ETCD) $(if $(findstring -store k,$(FLEET)),$(KUBE) $(OTHER_KUBE)) ## What many nodes do to etcd, or to an API server: FLEET="-store kubernetes -n 100,1000"
	@cd test && go run ./cmd/bench-fleet $(FLEET)

bench-udp: build need-demo $(ETCD) $(CNI) ## The udp backend beside vxlan, host-gw and wireguard
	@cd test && go run ./cmd/bench-udp

bench-kube: build need-lab $(ETCD) $(KUBE) ## One node among 5000 of Kubernetes
	@cd test && go run ./cmd/bench-kube

demo-kube: build install-demo-kube $(ETCD) $(CNI) $(KUBE) image ## A Kubernetes cluster: NODES=2 NFTABLES=1 KEEP=1
	@cd test && go run ./cmd/demo -kube

CONFORMANCE_NEEDS := build need-conformance $(ETCD) $(CNI) $(KUBE) build/bin/helm $(SUITE) $(NETPOL) \
	build/conformance/root.tar image
conformance: $(CONFORMANCE_NEEDS) ## Kubernetes' own tests of networking: FOCUS=regexp CONFORMANCE=all TESTS=network
	@cd test && go run ./cmd/conformance

conformance-quick: $(CONFORMANCE_NEEDS) ## A few of Kubernetes' own tests of networking
	@cd test && go run ./cmd/conformance -quick

demo-down: ## Take down what demo left with KEEP=1
	@cd test && go run ./cmd/demo -down

clean: ## Remove build output
	rm -rf build
