package cloud

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// serveMetadata answers what an instance asks about itself (IMDSv2: with a
// token). Which instance it is, its address tells.
func (s EC2) serveMetadata(w http.ResponseWriter, r *http.Request) {
	if fault := s.meet(r, Metadata); fault != "" {
		http.Error(w, string(fault), http.StatusServiceUnavailable)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	self := s.caller(r)
	if self == nil {
		http.Error(w, "no such instance", http.StatusNotFound)
		return
	}
	const ttl = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	if r.URL.Path == "/latest/api/token" {
		seconds, err := strconv.Atoi(r.Header.Get(ttl))
		if r.Method != http.MethodPut || err != nil || seconds < 1 || seconds > 21600 {
			http.Error(w, "Bad Request", http.StatusBadRequest)
			return
		}
		token := s.number("token")
		s.tokens[token+self.id] = true
		w.Header().Set(ttl, r.Header.Get(ttl))
		io.WriteString(w, token)
		return
	}
	if r.Method != http.MethodGet || !s.tokens[r.Header.Get("X-Aws-Ec2-Metadata-Token")+self.id] {
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	}
	text, ok := ec2Metadata(self)[strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/latest/"), "/")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	io.WriteString(w, text)
}

// ec2Role is the instances' role.
const ec2Role = "flanneld"

// ec2Metadata returns all that there is to know of an instance, by path.
func ec2Metadata(i *instance) map[string]string {
	document, _ := json.Marshal(map[string]string{"instanceId": i.id, "region": EC2Region, "version": "2017-09-30"})
	credentials, _ := json.Marshal(map[string]string{
		"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "secret", "Token": "session",
		"LastUpdated": "2000-01-01T00:00:00Z", "Expiration": "2100-01-01T00:00:00Z",
	})
	var four, six []string
	for _, a := range i.addresses {
		if a.Is4() {
			four = append(four, a.String())
		} else {
			six = append(six, a.String())
		}
	}
	all := map[string]string{
		"dynamic/instance-identity/document":            string(document),
		"meta-data/instance-id":                         i.id,
		"meta-data/placement/region":                    EC2Region,
		"meta-data/iam/security-credentials":            ec2Role,
		"meta-data/iam/security-credentials/" + ec2Role: string(credentials),
		"meta-data/network/interfaces/macs":             i.mac + "/",
	}
	for key, value := range map[string]string{
		"interface-id": i.eni, "subnet-id": i.subnet, "vpc-id": EC2VPC,
		"local-ipv4s": strings.Join(four, "\n"), "ipv6s": strings.Join(six, "\n"),
	} {
		if value != "" {
			all[fmt.Sprintf("meta-data/network/interfaces/macs/%s/%s", i.mac, key)] = value
		}
	}
	return all
}
