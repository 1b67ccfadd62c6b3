#!/usr/bin/env bash
# check_base_image.sh IMAGE RELEASE: refuses, where RELEASE is 1, an image without a digest: its tag may move.
set -euo pipefail
image=${1:?"BASE_IMAGE is empty; name:tag@sha256:... is allowed; give --build-arg BASE_IMAGE=..."}
release=${2:-0}

case "$release" in
0) exit 0 ;;
1) ;;
*)
    echo "RELEASE is '$release'; 0 and 1 are allowed" >&2
    exit 2
    ;;
esac
if ! [[ "$image" =~ @sha256:[0-9a-f]{64}$ ]]; then
    echo "BASE_IMAGE is '$image'; a release allows name:tag@sha256:DIGEST; see docs/images.md for how to find the digest" >&2
    exit 2
fi
