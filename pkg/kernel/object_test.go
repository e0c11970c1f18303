package kernel

import (
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestCommandsAreQuoted: the kernel takes almost any name for a device. A shell gets the name as one word, and a
// terminal sees no escape sequence.
func TestCommandsAreQuoted(t *testing.T) {
	nstest.Need(t, "bash")
	const programs = `ip() { printf '%s\n' "$@"; }; bridge() { ip "$@"; }; ethtool() { ip "$@"; }; `
	for _, dev := range []string{"eth0", "e;ip 'forged'", "$(ip forged)", "e\x1b[2J"} {
		link := Link{Name: dev, MTU: 1450, Type: VXLAN{VNI: 1, Port: 8472, Local: addr("198.18.0.1"), Dev: dev}, TXChecksumOff: true}
		tun := Link{Name: dev, MTU: 1450, Type: TUN{}}
		changed := link
		changed.MTU = 1400
		commands := []string{changeCommand(link, changed)}
		for _, o := range []Object{
			link, tun,
			Addr{Dev: dev, Prefix: prefix("10.5.1.0/32")},
			Neighbor{Dev: dev, IP: addr("10.5.2.0"), MAC: mac2},
			FDBEntry{Dev: dev, MAC: mac2, Dst: addr("198.18.0.2")},
			Route{Dst: prefix("10.5.2.0/24"), Via: addr("10.5.2.0"), Dev: dev, Onlink: true},
		} {
			commands = append(commands, o.String(), o.Undo())
		}
		commands = append(commands, nexthop{id: 77, via: addr("198.18.0.3"), dev: dev}.String())
		for _, command := range commands {
			if strings.ContainsFunc(command, func(r rune) bool { return !strconv.IsPrint(r) }) {
				t.Errorf("a command is %q", command)
			}
			out, err := exec.Command("bash", "-c", programs+command).CombinedOutput()
			words := strings.Split(string(out), "\n")
			if err != nil || !slices.Contains(words, dev) || slices.Contains(words, "forged") {
				t.Errorf("%s has the words %q, %v", command, words, err)
			}
		}
	}
}
