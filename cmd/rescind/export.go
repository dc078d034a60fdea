package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/manifest"
	"github.com/rescindhq/rescind/internal/obs"
)

const (
	usageExport = "rescind export [--tenant DOMAIN]... [-o FILE] [flags]"
	aboutExport = `Writes the catalog as YAML that rescind apply reads: applied to an empty database
it makes the same catalog, with the same ids. It has no secrets: clients get new
ones where they are made.`
)

func runExport(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind export", usageExport, aboutExport, stdout, stderr)
	var domains []string
	inv.flags.Func("tenant", "The `domain` of a tenant to write. May be given several times. Default all.", func(s string) error {
		if s == "" {
			return errors.New("must not be empty")
		}
		if !slices.Contains(domains, s) {
			domains = append(domains, s)
		}
		return nil
	})
	out := inv.flags.String("o", "", "The `file` to write. Default standard output.")
	cfg, code, ok := inv.settings(app.ForApply, args)
	switch {
	case !ok:
		return code
	case len(inv.words) > 0:
		return inv.misused("takes no argument, not %q", inv.words[0])
	}
	tools, err := app.OpenCatalog(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	defer tools.Close()
	state, err := manifest.ReadState(ctx, tools.Pool, domains)
	if err != nil {
		return inv.failed(err)
	}
	there := state.Tenants()
	missing := slices.DeleteFunc(slices.Clone(domains), func(d string) bool { return slices.Contains(there, d) })
	if len(missing) > 0 {
		return inv.failed(fmt.Errorf("there is no tenant %s", strings.Join(missing, ", ")))
	}
	if *out == "" {
		w := bufio.NewWriter(stdout)
		err = errors.Join(manifest.Export(w, state), w.Flush())
	} else {
		err = replaceFile(*out, func(w io.Writer) error { return manifest.Export(w, state) })
	}
	if err != nil {
		return inv.failed(err)
	}
	return exitOK
}

// replaceFile writes a whole file, or leaves what is there.
func replaceFile(path string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.new")
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	err = errors.Join(write(w), w.Flush(), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
