package tencentvpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
)

// Credentials of a role are replaced when they are valid for no more than this time.
const renewBefore = 5 * time.Minute

// logIn finds credentials, and renews those of a role before they expire.
func (c *cloud) logIn(ctx context.Context) error {
	if c.api.GetCredential() != nil && (c.expires.IsZero() || time.Until(c.expires) > renewBefore) {
		return nil
	}
	if c.expires.IsZero() {
		login, err := c.keys()
		if err != nil {
			return noCredentials(err)
		}
		if login != nil {
			c.api.WithCredential(login)
			return nil
		}
	}
	login, expires, err := c.metadata.role(ctx)
	switch {
	case err == nil:
		c.api.WithCredential(login)
		c.expires = expires
		return nil
	case time.Until(c.expires) > 0: // the old ones are still good
		return nil
	}
	return noCredentials(err)
}

// keys returns the API key of the configuration, of the environment or of the SDK's file, in this order; nil if there
// is none.
func (c *cloud) keys() (common.CredentialIface, error) {
	if c.AccessKeyID != "" {
		return common.NewCredential(c.AccessKeyID, c.AccessKeySecret), nil
	}
	for _, names := range [][3]string{
		{"ACCESS_KEY_ID", "ACCESS_KEY_SECRET", ""},
		{"TENCENTCLOUD_SECRET_ID", "TENCENTCLOUD_SECRET_KEY", "TENCENTCLOUD_SECURITY_TOKEN"},
	} {
		id, key := os.Getenv(names[0]), os.Getenv(names[1])
		if (id == "") != (key == "") {
			return nil, fmt.Errorf("%s and %s belong together, and only one is set", names[0], names[1])
		}
		if id != "" {
			return common.NewTokenCredential(id, key, os.Getenv(names[2])), nil
		}
	}
	path, set := os.LookupEnv(common.EnvCredentialFile)
	if home := os.Getenv("HOME"); !set && home != "" {
		path = home + "/.tencentcloud/credentials"
	}
	if _, err := os.Stat(path); path == "" || err != nil && !set {
		return nil, nil
	}
	return common.DefaultProfileProvider().GetCredential()
}

// role returns the credentials of the instance's role.
func (m *metadata) role(ctx context.Context) (login common.CredentialIface, expires time.Time, err error) {
	const directory = "cam/security-credentials/"
	roles, err := m.list(ctx, directory)
	if err != nil {
		return nil, expires, err
	}
	if len(roles) == 0 {
		return nil, expires, errors.New("the instance has no role")
	}
	text, err := m.get(ctx, directory+roles[0])
	if err != nil {
		return nil, expires, err
	}
	var answer struct {
		TmpSecretID  string `json:"TmpSecretId"`
		TmpSecretKey string
		Token        string
		ExpiredTime  int64 // in seconds since 1970
		Code         string
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return nil, expires, fmt.Errorf("credentials of the role: %w", err)
	}
	if answer.Code != "Success" {
		return nil, expires, fmt.Errorf("credentials of the role: %s", answer.Code)
	}
	return common.NewTokenCredential(answer.TmpSecretID, answer.TmpSecretKey, answer.Token),
		time.Unix(answer.ExpiredTime, 0), nil
}
