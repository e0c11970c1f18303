// Package kubelet writes Nodes as the components of a real cluster do: as large as those, and as often.
package kubelet

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// writers is how many requests are under way at once.
	writers = 16

	// requestTimeout bounds one of them.
	requestTimeout = 30 * time.Second
)

// A Client is a user of the API server.
type Client struct {
	HTTP   *http.Client
	Server string // URL
	Token  string // "": the HTTP client has a certificate
}

// New returns the user of a kubeconfig of the lab's, which is JSON.
func New(kubeconfig string, dial func(ctx context.Context, network, address string) (net.Conn,
	error)) (*Client, error) {
	text, err := os.ReadFile(kubeconfig)
	if err != nil {
		return nil, err
	}
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
				CAFile string `json:"certificate-authority"`
			}
		}
		Users []struct {
			User struct {
				TokenFile   string
				Certificate []byte `json:"client-certificate-data"`
				Key         []byte `json:"client-key-data"`
			}
		}
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, fmt.Errorf("%s: %w", kubeconfig, err)
	}
	if len(config.Clusters) != 1 || len(config.Users) != 1 {
		return nil, fmt.Errorf("%s is not one of the lab's", kubeconfig)
	}
	cluster, user := config.Clusters[0].Cluster, config.Users[0].User
	c := &Client{Server: cluster.Server}
	trust := &tls.Config{RootCAs: x509.NewCertPool()}
	if cluster.CAFile != "" {
		if cluster.CA, err = os.ReadFile(cluster.CAFile); err != nil {
			return nil, err
		}
	}
	trust.RootCAs.AppendCertsFromPEM(cluster.CA)
	if user.TokenFile != "" {
		if text, err = os.ReadFile(user.TokenFile); err != nil {
			return nil, err
		}
		c.Token = string(text)
	} else {
		certificate, err := tls.X509KeyPair(user.Certificate, user.Key)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kubeconfig, err)
		}
		trust.Certificates = []tls.Certificate{certificate}
	}
	c.HTTP = &http.Client{Transport: &http.Transport{
		DialContext: dial, TLSClientConfig: trust, MaxIdleConnsPerHost: writers,
	}}
	return c, nil
}

// Do sends a request. An answer that is not a success is an error.
func (c *Client) Do(ctx context.Context, method, path string, header http.Header, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.Server+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = header
	if c.Token != "" {
		req.Header.Set("Authorization", "Bearer "+c.Token)
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		answer, _ := io.ReadAll(resp.Body)
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(answer))
	}
	return resp, nil
}

// Write sends an object, or a patch of an object, as a component whose fields the API server knows.
func (c *Client) Write(ctx context.Context, method, path, manager string, object any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	header := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/vnd.kubernetes.protobuf"}}
	if method == http.MethodPatch {
		header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	resp, err := c.Do(ctx, method, path+"?fieldManager="+url.QueryEscape(manager), header, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// Size returns how long a Node is in protobuf.
func (c *Client) Size(ctx context.Context, name string) (int64, error) {
	resp, err := c.Do(ctx, http.MethodGet, "/api/v1/nodes/"+name,
		http.Header{"Accept": {"application/vnd.kubernetes.protobuf"}}, nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	return io.Copy(io.Discard, resp.Body)
}

// Each calls f for 0 to n-1, several at once, until a call fails.
func Each(ctx context.Context, n int, f func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var running sync.WaitGroup
	for range writers {
		running.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := f(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	running.Wait()
	return context.Cause(ctx)
}
