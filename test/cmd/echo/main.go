// Command echo answers HTTP requests on port 8080 with two words: its host
// name, and the address that the request came from. With an argument it is the
// client: it prints the answer of that address, host:port.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	run := serve
	if len(os.Args) > 1 {
		run = func() error { return ask(os.Args[1]) }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve() error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	return http.ListenAndServe(":8080", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintln(w, name, from)
	}))
}

func ask(address string) error {
	client := &http.Client{Timeout: 2 * time.Second}
	answer, err := client.Get("http://" + address)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}
