package main

import "testing"

// What a member counts while a node renews its etcd lease once, and once by way of a proxy, and while a watch begins and
// has two messages.
func TestEtcdField(t *testing.T) {
	const service = `grpc_service="etcdserverpb.Any",grpc_type="any"} `
	lines := []string{
		"# TYPE grpc_server_started_total counter",
		`grpc_server_started_total{grpc_method="LeaseKeepAlive",` + service,
		`grpc_server_msg_received_total{grpc_method="LeaseKeepAlive",` + service,
		`grpc_server_msg_sent_total{grpc_method="LeaseKeepAlive",` + service,
		`grpc_server_started_total{grpc_method="Watch",` + service,
		`grpc_server_msg_received_total{grpc_method="Watch",` + service,
		`grpc_server_msg_sent_total{grpc_method="Watch",` + service,
		`grpc_server_started_total{grpc_method="Txn",` + service,
		`grpc_server_msg_received_total{grpc_method="Txn",` + service,
		`grpc_server_msg_sent_total{grpc_method="Txn",` + service,
		`grpc_server_handled_total{grpc_method="Txn",` + service,
	}
	for _, c := range []struct {
		what   string
		counts []float64 // of lines
		want   traffic
	}{
		{"a renewal", []float64{0, 1, 2, 1, 0, 0, 0, 0, 0, 0, 0}, traffic{requests: 1}},
		{"a renewal on the stream of a proxy", []float64{0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0}, traffic{requests: 1}},
		{"a watch", []float64{0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0}, traffic{requests: 1, messages: 2}},
		{"a write", []float64{0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1}, traffic{requests: 1}},
	} {
		var got traffic
		for i, line := range lines {
			if field := etcdField(&got, line); field != nil {
				*field += c.counts[i]
			}
		}
		if got != c.want {
			t.Errorf("%s counts as %+v, want %+v", c.what, got, c.want)
		}
	}
}
