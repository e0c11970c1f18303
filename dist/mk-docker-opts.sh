#!/bin/sh
# Reads flanneld's subnet file, and writes Docker's options for this node's subnet
# to a file that systemd can read as an EnvironmentFile, and a shell as a script.
set -eu
export LC_ALL=C

usage() {
	cat <<END
Usage: $0 [-f FILE] [-d FILE] [-i] [-c] [-m] [-k NAME]

  -f FILE  flanneld's subnet file (/run/flannel/subnet.env)
  -d FILE  where to write the options (/run/docker_opts.env)
  -i       each option as a variable of its own: DOCKER_OPT_MTU="--mtu=1450"
  -c       all options as one variable: DOCKER_OPTS=" --bip=10.5.34.1/24 ... "
           Neither -i nor -c: both.
  -k NAME  the name of that variable (DOCKER_OPTS); what it holds in the
           environment comes first
  -m       leave --ip-masq to Docker

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
while getopts f:d:icmk:h option; do
	case $option in
	f) from=$OPTARG ;;
	d) to=$OPTARG ;;
	i) each=true ;;
	c) all=true ;;
	m) masq=false ;;
	k) name=$OPTARG ;;
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

# The file is read, not executed: its writer need not have the rights of root.
[ -r "$from" ] || fail "cannot read $from: flanneld writes it once it is ready"
while IFS='=' read -r key value || [ -n "$key" ]; do
	case $value in
	*[!A-Za-z0-9.:/]*) fail "$from: $key=$value is nothing that flanneld writes" ;;
	esac
	case $key in
	FLANNEL_SUBNET) DOCKER_OPT_BIP=--bip=$value ;;
	FLANNEL_IPV6_SUBNET) DOCKER_OPT_IPV6=--ipv6 DOCKER_OPT_FIXED_CIDR_V6=--fixed-cidr-v6=$value ;;
	FLANNEL_MTU) DOCKER_OPT_MTU=--mtu=$value ;;
	FLANNEL_IPMASQ)
		case $masq$value in
		truetrue) DOCKER_OPT_IPMASQ=--ip-masq=false ;; # flanneld masquerades
		truefalse) DOCKER_OPT_IPMASQ=--ip-masq=true ;;
		false*) ;;
		*) fail "$from: FLANNEL_IPMASQ=$value is neither true nor false" ;;
		esac
		;;
	esac
done <"$from"

lines=
eval "options=\"\${$name:-} \""
for variable in $(set | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p' | sort); do
	eval "value=\$$variable"
	[ $each = false ] || lines="$lines$variable=\"$value\"
"
	options="$options$value "
done
[ $all = false ] || lines="$lines$name=\"$options\"
"
printf %s "$lines" >"$to"
