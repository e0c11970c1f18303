package alivpc

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/aliyun/credentials-go/credentials/providers"
)

// renewBefore is how long before their end credentials of the instance's role are renewed.
const renewBefore = 10 * time.Minute

// keys are credentials of the API.
type keys struct{ id, secret, token string }

// A login finds credentials.
type login struct {
	Host
	configured keys // of the network's configuration
	metadata   *metadata

	sdk  providers.CredentialsProvider // one that the SDK's variables ask for; nil: none yet
	role keys                          // of the instance's role
	ends time.Time                     // when they do
}

// keys returns credentials: those of the configuration, of the host, of the SDK, or of the instance's role.
func (l *login) keys(ctx context.Context) (keys, error) {
	if l.configured.id != "" && l.configured.secret != "" {
		return l.configured, nil
	}
	switch {
	case l.AccessKeyID != "" && l.AccessKeySecret != "":
		return keys{id: l.AccessKeyID, secret: l.AccessKeySecret}, nil
	case l.AccessKeyID != "" || l.AccessKeySecret != "":
		return keys{}, errors.New("of ACCESS_KEY_ID and ACCESS_KEY_SECRET, one is not set")
	}
	if l.sdk == nil {
		var err error
		if l.sdk, err = fromSDK(); err != nil {
			return keys{}, err
		}
	}
	if l.sdk != nil {
		k, err := l.sdk.GetCredentials()
		if err != nil {
			return keys{}, err
		}
		return keys{k.AccessKeyId, k.AccessKeySecret, k.SecurityToken}, nil
	}
	if time.Until(l.ends) < renewBefore {
		if err := l.renew(ctx); err != nil && time.Until(l.ends) < 0 {
			return keys{}, err
		}
	}
	return l.role, nil
}

// fromSDK returns the SDK's provider of credentials for which the SDK's variables are set; nil, if that is none. The
// SDK's chain of all its providers would not do: after a failure, the chain keeps to its last provider.
func fromSDK() (providers.CredentialsProvider, error) {
	switch {
	case os.Getenv("ALIBABA_CLOUD_ACCESS_KEY_ID") != "":
		return providers.NewEnvironmentVariableCredentialsProviderBuilder().Build()
	case os.Getenv("ALIBABA_CLOUD_OIDC_TOKEN_FILE") != "":
		return providers.NewOIDCCredentialsProviderBuilder().Build()
	case os.Getenv("ALIBABA_CLOUD_CREDENTIALS_FILE") != "":
		return providers.NewProfileCredentialsProviderBuilder().Build()
	case os.Getenv("ALIBABA_CLOUD_CREDENTIALS_URI") != "":
		return providers.NewURLCredentialsProviderBuilder().Build()
	}
	return nil, nil
}

// renew gets the credentials of the instance's role.
func (l *login) renew(ctx context.Context) error {
	const path = "ram/security-credentials/"
	name := l.Role
	if name == "" {
		names, err := l.metadata.lines(ctx, path)
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return errors.New("the instance has no RAM role")
		}
		name = names[0]
	}
	text, err := l.metadata.get(ctx, path+name)
	if err != nil {
		return fmt.Errorf("RAM role %s: %w", name, err)
	}
	var answer struct {
		Code, AccessKeyId, AccessKeySecret, SecurityToken string
		Expiration                                        time.Time
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return fmt.Errorf("RAM role %s: %w", name, err)
	}
	if answer.Code != "Success" || answer.AccessKeyId == "" {
		return fmt.Errorf("RAM role %s: the metadata service answers %s", name, cmp.Or(answer.Code, "without a code"))
	}
	l.role = keys{answer.AccessKeyId, answer.AccessKeySecret, answer.SecurityToken}
	l.ends = answer.Expiration
	return nil
}
