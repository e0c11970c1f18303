# Builds, checks and tests everything. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

STATICCHECK_VERSION := v0.8.2
# For each fuzz target: a count, since a time that runs out while the machine is
# busy is now and then reported as a failure (context deadline exceeded).
FUZZTIME ?= 50000x
TESTFLAGS ?=# such as -v or -run=TestRestart

# Programs that the lab and the tests in namespaces run, and the packages that
# have them where apt-get is.
PROGRAMS := iptables:iptables nft:nftables ip:iproute2 ping:iputils-ping iperf3:iperf3 tcpdump:tcpdump ethtool:ethtool

export PATH := $(PATH):/usr/sbin:/sbin
# The version comes from git describe below; git may refuse to serve root.
export GOFLAGS := $(GOFLAGS) -buildvcs=false
STATIC := CGO_ENABLED=0 go build -trimpath
# The race detector needs cgo, and that a C compiler.
RACE := $(if $(shell command -v gcc),-race)

BINARIES := $(patsubst cmd/%/main.go,build/bin/%,$(wildcard cmd/*/main.go))
SOURCES := $(shell find . -path ./test -prune -o -path ./build -prune -o -path ./.git -prune -o -type f -not -name '*_test.go' -print)
ETCD := build/bin/etcd build/bin/etcdctl
CNI := build/cni/bridge build/cni/host-local build/cni/loopback
KUBE := build/kube/kube-apiserver build/kube/kube-controller-manager

.PHONY: help build tools programs check test unit fuzz e2e demo demo-down clean FORCE
.NOTPARALLEL: # the go tool uses all processors itself

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

build: $(BINARIES) ## Build the static binaries into build/bin

$(BINARIES): build/bin/%: $(SOURCES) build/version
	$(STATIC) -ldflags "-s -w -X main.version=$$(cat build/version)" -o $@ ./cmd/$*

# Rewritten only when the version has changed.
build/version: FORCE
	@mkdir -p build
	@version=$$(git describe --tags --always --dirty 2>/dev/null || echo unknown); \
	[ "$$version" = "$$(cat $@ 2>/dev/null)" ] || echo "$$version" > $@

tools: programs build/bin/staticcheck $(ETCD) $(CNI) $(KUBE) ## Install what checks and tests need

programs:
	@missing() { for p in $(PROGRAMS); do command -v "$${p%:*}" >/dev/null || echo -n " $$p"; done; }; \
	want=$$(missing); \
	if [ -n "$$want" ] && command -v apt-get >/dev/null; then \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$(tr ' ' '\n' <<<"$$want" | sed 's/.*://'); } || true; \
		want=$$(missing); \
	fi; \
	if [ -n "$$want" ]; then \
		echo "missing programs:$$(sed 's/:[^ ]*//g' <<<"$$want"); install them (packages:$$(sed 's/[^ ]*://g' <<<"$$want")) and run make again" >&2; \
		exit 1; \
	fi

build/bin/staticcheck: Makefile
	GOBIN=$(CURDIR)/build/bin go install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK_VERSION)
	@touch $@

# The real etcd and CNI plugins, of the versions in test/go.mod.
build/bin/etcd: package = go.etcd.io/etcd/server/v3
build/bin/etcdctl: package = go.etcd.io/etcd/etcdctl/v3
build/cni/bridge build/cni/loopback: package = github.com/containernetworking/plugins/plugins/main/$(@F)
build/cni/host-local: package = github.com/containernetworking/plugins/plugins/ipam/$(@F)
$(ETCD) $(CNI): test/go.mod
	cd test && $(STATIC) -ldflags "-s -w" -o $(CURDIR)/$@ $(package)
	@touch $@

# A real control plane; some minutes, once.
$(KUBE): test/kubernetes/go.mod
	cd test/kubernetes && $(STATIC) -ldflags "-s -w" -o $(CURDIR)/$@ k8s.io/kubernetes/cmd/$(@F)
	@touch $@

check: build/bin/staticcheck ## Formatting, vet, staticcheck, go.mod; of both modules
	@unformatted=$$(gofmt -l .); \
	[ -z "$$unformatted" ] || { echo "run gofmt -w on:"; echo "$$unformatted"; exit 1; }
	@for module in . test; do \
		(cd $$module && set -x && go vet ./... && $(CURDIR)/build/bin/staticcheck ./... && go mod tidy -diff); \
	done

test: check fuzz unit e2e ## Everything: check, fuzz, unit and end-to-end tests (root)

unit: programs ## Unit and in-namespace tests of the main module
	go test $(RACE) $(TESTFLAGS) ./...

fuzz: ## Each fuzz target for FUZZTIME
	@go test -list '^Fuzz' ./... | awk '/^Fuzz/ { names[++n] = $$1 } /^ok/ { for (i = 1; i <= n; i++) print names[i], $$2; n = 0 }' | \
	while read -r name package; do \
		echo "go test -fuzz $$name -fuzztime $(FUZZTIME) $$package"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package"; \
	done

# Not from the test cache: it cannot know that the binaries have changed. One
# package at a time: the machine is shared by a dozen nodes as it is.
e2e: build programs $(ETCD) $(CNI) $(KUBE) ## End-to-end tests in the lab
	cd test && go test $(RACE) -count=1 -p=1 -timeout=30m $(TESTFLAGS) ./...

demo: build programs $(ETCD) $(CNI) ## A cluster to look at: NODES=3 BACKEND=vxlan IPV6=1 NFTABLES=1 KEEP=1
	@cd test && go run ./cmd/demo

demo-down: ## Take down what demo left with KEEP=1
	@cd test && go run ./cmd/demo -down

clean: ## Remove build output
	rm -rf build
