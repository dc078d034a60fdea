# Installs the packages that are its arguments with apt-get so that no service is started, none is enabled that was not
# before, and Postgres gets no cluster of its own. What it changes for that time it puts back, also when interrupted;
# after a SIGKILL the next run does.
set -eu

root=${RESCIND_INSTALL_ROOT:-}
policy=$root/usr/sbin/policy-rc.d
aside=$policy.before-rescind
mark='# made by rescind-dev, for as long as it installs packages'
clusters=$root/etc/postgresql-common/createcluster.d
cluster=$clusters/rescind-dev.conf
work=$(mktemp -d)

put_back() {
	if grep -qsF "$mark" "$policy"; then rm -f "$policy"; fi
	if [ -e "$aside" ] || [ -L "$aside" ]; then mv -f "$aside" "$policy"; fi
	rm -f "$cluster"
	if [ -e "$clusters.made-by-rescind" ]; then
		rm -f "$clusters.made-by-rescind"
		rmdir -p --ignore-fail-on-non-empty "$clusters"
	fi
}

# Unit files and init scripts: what can be enabled.
services() {
	for f in "$root"/lib/systemd/system/*.service "$root"/lib/systemd/system/*.socket "$root"/lib/systemd/system/*.timer "$root"/etc/init.d/*; do
		if [ -f "$f" ]; then echo "$f"; fi
	done | sort
}

disable_new() {
	services >"$work/after"
	comm -13 "$work/before" "$work/after" | while read -r f; do
		case $f in
		"$root"/etc/init.d/*) update-rc.d "${f##*/}" disable ;;
		*@.*) ;; # a template: enabled only by name
		*) if command -v systemctl >/dev/null; then
			systemctl disable "${f##*/}"
		else
			deb-systemd-helper disable "${f##*/}"
		fi ;;
		esac >/dev/null 2>&1 || echo "could not disable $f"
	done
}

# One at a time, or one would put back what another still needs.
exec 9>"$root/var/lock/rescind-dev-install"
flock -w 300 9

put_back
services >"$work/before"
trap 'disable_new; put_back; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP

if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$aside"; fi
printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$policy"
chmod 755 "$policy"
if [ ! -d "$clusters" ]; then
	mkdir -p "$clusters"
	: >"$clusters.made-by-rescind"
fi
echo 'create_main_cluster = false' >"$cluster"

export DEBIAN_FRONTEND=noninteractive
get() {
	apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 "$@" 9>&- </dev/null
}
# The package lists may be there and good: to fetch them takes longer than to try.
get install -y --no-install-recommends "$@" || {
	get update
	get install -y --no-install-recommends "$@"
}
