package alivpc

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	openapiutil "github.com/alibabacloud-go/darabonba-openapi/v2/utils"
	"github.com/alibabacloud-go/tea/dara"
)

// maxAnswer is how many bytes of an answer of the API are read. A page of 100 entries has some 50 kB.
const maxAnswer = 8 << 20

// A product is one of Alibaba Cloud's, with an API of its own.
type product struct{ name, version string }

var (
	vpc = product{"vpc", "2016-04-28"}
	ecs = product{"ecs", "2014-05-26"}
)

// endpoint returns where the API of a product is in a region. The address inside of VPCs needs no way to the internet.
func (h Host) endpoint(p product, region string) (scheme, host string) {
	set := h.VPCEndpoint
	if p == ecs {
		set = h.ECSEndpoint
	}
	if scheme, host, ok := strings.Cut(set, "://"); ok {
		return scheme, strings.TrimSuffix(host, "/")
	}
	if h.Public {
		return "https", cmp.Or(set, p.name+"."+region+".aliyuncs.com")
	}
	return "https", cmp.Or(set, p.name+"-vpc."+region+".aliyuncs.com")
}

// newAPI returns the API of a region.
func newAPI(h Host, region string, l *login) *api {
	a := &api{Host: h, region: region, login: l}
	a.web.Transport = &http.Transport{Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true,
		TLSHandshakeTimeout: 10 * time.Second, IdleConnTimeout: 10 * time.Second}
	return a
}

// An api calls the APIs of products in a region, with the generic call of the SDK. The SDKs of the products add nothing
// to that but generated parameters, take a minute to compile, and the one for VPC has no calls with a context.
type api struct {
	Host
	region string
	login  *login
	web    web
}

// call calls an action with parameters, which are strings, numbers and lists of strings, and reads the answer into
// answer; nil: it has nothing of interest.
func (a *api) call(ctx context.Context, p product, action string, parameters map[string]any, answer any) error {
	k, err := a.login.keys(ctx)
	if err != nil {
		return &loginError{err}
	}
	scheme, host := a.endpoint(p, a.region)
	client, err := openapi.NewClient(&openapiutil.Config{
		AccessKeyId: &k.id, AccessKeySecret: &k.secret, SecurityToken: &k.token,
		RegionId: &a.region, Endpoint: &host, Protocol: &scheme, HttpClient: &a.web, UserAgent: dara.String("flanneld"),
	})
	if err != nil {
		return &loginError{err}
	}
	client.DisableSDKError = dara.Bool(true) // which loses the types of errors
	parameters["RegionId"] = a.region
	result, err := client.CallApiWithCtx(ctx, &openapiutil.Params{
		Action: &action, Version: &p.version, Protocol: dara.String("HTTPS"), Pathname: dara.String("/"),
		Method: dara.String(http.MethodPost), AuthType: dara.String("AK"), Style: dara.String("RPC"),
		ReqBodyType: dara.String("formData"), BodyType: dara.String("string"),
	}, &openapiutil.OpenApiRequest{Query: openapiutil.Query(parameters)}, &dara.RuntimeOptions{})
	if err != nil || answer == nil {
		return err
	}
	text, _ := result["body"].(string)
	return json.Unmarshal([]byte(text), answer)
}

// web sends the SDK's requests.
type web struct{ http.Client }

// Call implements dara.HttpClient.
func (w *web) Call(r *http.Request, _ *http.Transport) (*http.Response, error) {
	answer, err := w.Do(r)
	if err == nil {
		answer.Body = http.MaxBytesReader(nil, answer.Body, maxAnswer)
	}
	return answer, err
}
