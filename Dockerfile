# An image with flanneld, flannel, the CNI plugin, and flannelctl, for operators:
# /opt/bin/flanneld, as in upstream's image, and beside it the two. It needs no
# shell.
#
#   make image ARCH=arm64 IMAGE=example.com/flannel:v1
#
# builds the static binaries and this. BASE is an image that has iptables (both
# variants, where nodes differ) and nft; without one, make image takes the
# packages' files from Debian.
ARG BASE
FROM ${BASE}
ARG TARGETARCH=amd64
COPY ${TARGETARCH}/ /opt/bin/
ENV PATH=/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENTRYPOINT ["/opt/bin/flanneld"]
