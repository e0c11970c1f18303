package alivpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	// metadataURL is where every ECS instance has its metadata.
	metadataURL = "http://100.100.100.200"

	// Headers of the hardened mode.
	tokenHeader = "X-aliyun-ecs-metadata-token"
	lifeHeader  = "X-aliyun-ecs-metadata-token-ttl-seconds"

	// tokenLife is how long a token of the metadata service is good for, in seconds: as long as the service allows.
	tokenLife = "21600"

	// maxMetadata is how many bytes of an answer are read.
	maxMetadata = 64 << 10
)

// metadata is the metadata service of the instance. Its hardened mode, in which each request has a token, is used where
// there is one.
type metadata struct {
	Host
	http  http.Client
	token string // empty: none yet, or the service has none
}

func newMetadata(h Host) *metadata {
	m := &metadata{Host: h}
	m.Metadata = strings.TrimSuffix(cmp.Or(h.Metadata, metadataURL), "/")
	m.http.Transport = &http.Transport{IdleConnTimeout: 10 * time.Second} // and no proxy, which has other metadata
	return m
}

// errNoMetadata is returned for a path that does not exist.
var errNoMetadata = errors.New("the metadata have no such entry")

// get returns the metadata at a path, such as "instance-id".
func (m *metadata) get(ctx context.Context, path string) (string, error) {
	for {
		fresh := m.token == ""
		if fresh {
			if err := m.renewToken(ctx); err != nil {
				return "", err
			}
		}
		status, text, err := m.request(ctx, http.MethodGet, "/latest/meta-data/"+path, tokenHeader, m.token)
		switch {
		case err != nil:
			return "", err
		case status == http.StatusOK:
			return strings.TrimSpace(text), nil
		case status == http.StatusNotFound:
			return "", fmt.Errorf("%s: %w", path, errNoMetadata)
		case fresh || status != http.StatusUnauthorized && status != http.StatusForbidden:
			return "", fmt.Errorf("HTTP status %d", status)
		}
		m.token = "" // which has expired
	}
}

// lines returns the lines of the metadata at a path; none, if the path does not exist.
func (m *metadata) lines(ctx context.Context, path string) ([]string, error) {
	text, err := m.get(ctx, path)
	if errors.Is(err, errNoMetadata) {
		return nil, nil
	}
	return strings.Fields(text), err
}

// renewToken asks for a token. Where there is none to be had, the requests go without, unless the host forbids that.
// An instance that insists on tokens refuses them.
func (m *metadata) renewToken(ctx context.Context) error {
	m.token = ""
	status, text, err := m.request(ctx, http.MethodPut, "/latest/api/token", lifeHeader, tokenLife)
	switch {
	case err == nil && status == http.StatusOK:
		m.token = strings.TrimSpace(text)
		return nil
	case !m.NeedToken:
		return nil
	case err == nil:
		err = fmt.Errorf("no token: HTTP status %d", status)
	}
	return err
}

// request sends a request with a header, unless its value is empty.
func (m *metadata) request(ctx context.Context, method, path, header, value string) (status int, text string,
	err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, m.Metadata+path, nil)
	if err != nil {
		return 0, "", err
	}
	if value != "" {
		r.Header.Set(header, value)
	}
	answer, err := m.http.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(io.LimitReader(answer.Body, maxMetadata))
	return answer.StatusCode, string(data), err
}
