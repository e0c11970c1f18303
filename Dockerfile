# An image that takes the place of flannel's image and of its flannel-cni-plugin
# image: it has the programs and files of both at the same paths, see
# dist/image/files. It needs no shell.
#
#   make image ARCH=arm64 IMAGE=example.com/flannel:v1
#
# builds the static binaries and this. BASE is an image that has iptables (both
# variants, where nodes differ) and nft; without one, make image takes the
# packages' files from Debian.
ARG BASE
FROM ${BASE}
ARG TARGETARCH=amd64
COPY ${TARGETARCH}/ /
# The last directory has commands for a base that lacks them.
ENV PATH=/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/bin/fallback
ENTRYPOINT ["/opt/bin/flanneld"]
