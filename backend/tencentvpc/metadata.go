package tencentvpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
)

const (
	// metadataTimeout is for how long an instance waits for its metadata.
	metadataTimeout = 5 * time.Second
	// maxMetadata is how many bytes an answer may have.
	maxMetadata = 1 << 16
)

// metadata is the metadata service of the instance.
type metadata struct {
	url    string
	client *http.Client
}

func newMetadata() *metadata {
	return &metadata{
		url: strings.TrimSuffix(cmp.Or(os.Getenv("TENCENTCLOUD_METADATA_ENDPOINT"), "http://metadata.tencentyun.com"), "/") +
			"/latest/meta-data/",
		// The service is on the instance's own link: no proxy leads there.
		client: &http.Client{Timeout: metadataTimeout, Transport: &http.Transport{DisableKeepAlives: true}},
	}
}

// errNotFound is the error of a key that the metadata does not have.
var errNotFound = errors.New("HTTP status 404")

// get returns the text of a key.
func (m *metadata) get(ctx context.Context, key string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, m.url+key, nil)
	if err != nil {
		return "", err
	}
	answer, err := m.client.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	switch answer.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return "", errNotFound
	default:
		return "", fmt.Errorf("HTTP status %d", answer.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxMetadata))
	return strings.TrimSpace(string(text)), err
}

// list returns the names in a directory.
func (m *metadata) list(ctx context.Context, directory string) ([]string, error) {
	text, err := m.get(ctx, directory)
	if errors.Is(err, errNotFound) {
		return nil, nil
	}
	names := strings.Fields(text)
	for i := range names {
		names[i] = strings.TrimSuffix(names[i], "/")
	}
	return names, err
}

// NextHop implements cloudroute.Cloud: it is the private address that the uplink has.
func (c *cloud) NextHop(ctx context.Context, uplink iface.Uplink) (cloudroute.NextHop, error) {
	const interfaces = "network/interfaces/macs/"
	macs, err := c.metadata.list(ctx, interfaces)
	if err != nil {
		return cloudroute.NextHop{}, noMetadata(err)
	}
	var others []string
	for _, mac := range macs {
		addresses, err := c.metadata.list(ctx, interfaces+mac+"/local-ipv4s/")
		if err != nil {
			return cloudroute.NextHop{}, noMetadata(err)
		}
		if !slices.ContainsFunc(addresses, func(text string) bool {
			a, err := netip.ParseAddr(text)
			return err == nil && a == uplink.IPv4.Addr
		}) {
			others = append(others, addresses...)
			continue
		}
		found := cloudroute.NextHop{ID: uplink.IPv4.Addr.String()}
		found.VPC, err = c.metadata.get(ctx, interfaces+mac+"/vpc-id")
		if errors.Is(err, errNotFound) {
			return cloudroute.NextHop{}, fmt.Errorf("the instance metadata has no VPC for the interface with the address %s: "+
				"tencent-vpc needs one", uplink.IPv4.Addr)
		}
		if err == nil {
			found.Subnet, err = c.metadata.get(ctx, interfaces+mac+"/subnet-id")
		}
		if err != nil {
			return cloudroute.NextHop{}, noMetadata(err)
		}
		return found, nil
	}
	return cloudroute.NextHop{}, notMine(uplink, others)
}
