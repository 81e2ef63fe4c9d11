#!/bin/bash
# reg.sh port dir
mkdir -p $2
printf 'version: 0.1\nlog: {level: error}\nhttp: {addr: "127.0.0.1:%s"}\nstorage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}\n' $1 $2 > /tmp/t/reg$1.yml
exec docker-registry serve /tmp/t/reg$1.yml
