#!/usr/bin/env bash
# Makes hello.tar, beside this file, from hello/: needs gcc, GNU tar and a Docker Engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
name=hello:1.0

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp -r hello/Dockerfile hello/late "$context/"

gcc -Os -static -nostdlib -ffreestanding -fno-pie -no-pie -fno-stack-protector \
    -fno-asynchronous-unwind-tables -fno-builtin -Wall -Wextra -Werror \
    -Wl,--build-id=none -Wl,-z,noseparate-code -s -o "$context/hello" hello/hello.c

# The links are made here: a checkout keeps neither hard links nor, everywhere, symbolic ones.
cp -r hello/root "$context/root"
ln -s ../usr/share/hello/README "$context/root/etc/hello.readme"
ln "$context/root/etc/hello.conf" "$context/root/etc/hello.d/00-default.conf"
tar --sort=name --owner=0 --group=0 --numeric-owner --mode='u=rwX,go=rX' \
    -cf "$context/root.tar" -C "$context/root" .

# The classic builder: one layer for each step, history as everyone knows it.
DOCKER_BUILDKIT=0 docker build --quiet --no-cache --tag "$name" "$context"
docker run --rm --network none "$name"
docker save --output hello.tar.part "$name"
mv hello.tar.part hello.tar
chmod 644 hello.tar
ls -l hello.tar
