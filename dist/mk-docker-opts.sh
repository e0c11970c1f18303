#!/bin/sh
# Reads flanneld's subnet file, and writes Docker's options for this node's subnet
# to a file that systemd can read as an EnvironmentFile, and a shell as a script.
# Without -6, the result is what flannel's script of this name writes.
set -eu
export LC_ALL=C

usage() {
	cat <<END
Usage: $0 [-f FILE] [-d FILE] [-i] [-c] [-m] [-6] [-k NAME]

  -f FILE  flanneld's subnet file (/run/flannel/subnet.env). If it is missing, the
           variables FLANNEL_... of the environment count, and there may be none
  -d FILE  where to write the options (/run/docker_opts.env)
  -i       each option as a variable of its own: DOCKER_OPT_MTU="--mtu=1450"
  -c       all options as one variable: DOCKER_OPTS=" --bip=10.5.34.1/24 ..."
           Neither -i nor -c: both.
  -k NAME  the name of that variable (DOCKER_OPTS); what it holds in the
           environment comes first
  -m       leave --ip-masq to Docker
  -6       the options for IPv6 as well: --ipv6 and --fixed-cidr-v6

Variables of the environment called DOCKER_OPT_... are options as well.
END
}

fail() {
	echo "$0: $*" >&2
	exit 1
}

from=/run/flannel/subnet.env
to=/run/docker_opts.env
name=DOCKER_OPTS
each=false
all=false
masq=true
ipv6=false
while getopts f:d:icmk:6h option; do
	case $option in
	f) from=$OPTARG ;;
	d) to=$OPTARG ;;
	i) each=true ;;
	c) all=true ;;
	m) masq=false ;;
	k) name=$OPTARG ;;
	6) ipv6=true ;;
	h) usage; exit ;;
	*) usage >&2; exit 1 ;;
	esac
done
case $name in
'' | [0-9]* | *[!A-Za-z0-9_]*) fail "-k: \"$name\" is no name of a variable: letters, digits and _" ;;
esac
if [ $each = false ] && [ $all = false ]; then
	each=true
	all=true
fi

# take checks a variable, and turns it into Docker's options.
take() {
	case $2 in
	'') return ;;
	*[!A-Za-z0-9.:/]*) fail "$1=$2 is nothing that flanneld writes" ;;
	esac
	case $1 in
	FLANNEL_SUBNET) DOCKER_OPT_BIP=--bip=$2 ;;
	FLANNEL_IPV6_SUBNET) [ $ipv6 = false ] || DOCKER_OPT_IPV6=--ipv6 DOCKER_OPT_FIXED_CIDR_V6=--fixed-cidr-v6=$2 ;;
	FLANNEL_MTU) DOCKER_OPT_MTU=--mtu=$2 ;;
	FLANNEL_IPMASQ)
		case $masq$2 in
		truetrue) DOCKER_OPT_IPMASQ=--ip-masq=false ;; # flanneld masquerades
		truefalse) DOCKER_OPT_IPMASQ=--ip-masq=true ;;
		false*) ;;
		*) echo "$0: FLANNEL_IPMASQ=$2 is neither true nor false: no option for Docker" >&2 ;;
		esac
		;;
	esac
}

take FLANNEL_SUBNET "${FLANNEL_SUBNET:-}"
take FLANNEL_IPV6_SUBNET "${FLANNEL_IPV6_SUBNET:-}"
take FLANNEL_MTU "${FLANNEL_MTU:-}"
take FLANNEL_IPMASQ "${FLANNEL_IPMASQ:-}"

# The file is read, not executed: its writer need not have the rights of root.
if [ -f "$from" ]; then
	while IFS='=' read -r key value || [ -n "$key" ]; do
		case $key in
		FLANNEL_SUBNET | FLANNEL_IPV6_SUBNET | FLANNEL_MTU | FLANNEL_IPMASQ)
			value=${value#\"}
			take "$key" "${value%\"}"
			;;
		esac
	done <"$from"
fi

lines=
eval "options=\${$name:-}"
[ -z "$options" ] || options="$options "
for variable in $(set | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p' | sort); do
	eval "value=\$$variable"
	[ $each = false ] || lines="$lines$variable=\"$value\"
"
	options="$options $value"
done
[ $all = false ] || lines="$lines$name=\"$options\"
"

# A reader finds the old options or the new ones. What is no plain file stays what it is.
if [ ! -L "$to" ] && { [ ! -e "$to" ] || [ -f "$to" ]; }; then
	temporary=$to.$$
	trap 'rm -f "$temporary"' EXIT
	if (printf %s "$lines" >"$temporary" && mv -f "$temporary" "$to") 2>/dev/null; then
		exit
	fi
fi
printf %s "$lines" >"$to"
