package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/flanneld/flanneld/test/kubelet"
)

// floorArg has the program be the floor, see floor.
const floorArg = "-floor"

// floor follows all Nodes as the daemon does, with nothing but net/http, and
// decodes none of them. It prints their number once it has been sent all.
func floor(ctx context.Context, kubeconfig string) error {
	c, err := kubelet.New(kubeconfig, (&net.Dialer{}).DialContext)
	if err != nil {
		return err
	}
	resp, err := c.Do(ctx, http.MethodGet, "/api/v1/nodes?watch=1&allowWatchBookmarks=1"+
		"&sendInitialEvents=1&resourceVersionMatch=NotOlderThan",
		http.Header{"Accept": {"application/vnd.kubernetes.protobuf;stream=watch"}}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body := bufio.NewReaderSize(resp.Body, 64<<10)
	var buf []byte
	for count := 0; ; count++ {
		var header [4]byte
		if _, err := io.ReadFull(body, header[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(header[:]))
		if n > cap(buf) {
			buf = make([]byte, 2*n)
		}
		if _, err := io.ReadFull(body, buf[:n]); err != nil {
			return err
		}
		if n < 1000 && bytes.Contains(buf[:n], []byte("k8s.io/initial-events-end")) {
			fmt.Println(count)
		}
	}
}
