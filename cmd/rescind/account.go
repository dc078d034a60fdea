package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/obs"
)

const (
	usageAccount = "rescind account put NAME [--role ROLE] | list | delete NAME  [flags]"
	aboutAccount = `Manages the accounts of people and gateways, which use the management API, the
snapshots and the event hub with a user name and a password.

  put NAME     makes the account, or changes its password, its extra tenants and
               its form, those that are given; its role and tenant stay as they are
  list         shows all accounts
  delete NAME  removes the account; a running service lets it in for some seconds
               more

The roles: admin (everything), tenant_admin (everything of its tenant), gateway
(reads), notifier (may report revocations), auditor (reads the management API).`
)

func runAccount(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind account", usageAccount, aboutAccount, stdout, stderr)
	var c authn.AccountChange
	inv.flags.StringVar(&c.Role, "role", "", "The `role`, for put: admin, tenant_admin, gateway, notifier or auditor. A new account needs it.")
	inv.flags.StringVar(&c.Tenant, "tenant", "", "The `domain` of the account's tenant, for put. A new account is of "+revocation.SuperTenant.Domain+" without it.")
	extra := inv.flags.String("extra-tenants", "", "The `domains`, with commas, of more tenants that it sees, or * for all, or empty for none, for put.")
	form := inv.flags.String("revoked-jwt-form", "", "The `form` in which it reads revoked tokens, for put: array, as a new account without it, or object for gateways since 4.3.")
	passwordFile := inv.flags.String("password-file", "", "The `file` that holds the password, or - for standard input, for put. A new account needs it.")
	asJSON := inv.flags.Bool("json", false, "Write JSON, for list.")
	cfg, code, ok := inv.settings(app.ForApply, args)
	if !ok {
		return code
	}
	verb, name, err := accountWords(inv.words)
	if err != nil {
		return inv.misused("%v", err)
	}
	if verb == "put" {
		c.Username = name
		inv.flags.Visit(func(f *flag.Flag) { // what is not given stays as it is
			switch f.Name {
			case "revoked-jwt-form":
				object := *form == "object"
				c.RevokedJWTObject = &object
			case "extra-tenants":
				domains := strings.FieldsFunc(*extra, func(r rune) bool { return r == ',' })
				c.ExtraTenants = &domains
			}
		})
		if c.RevokedJWTObject != nil && *form != "array" && *form != "object" {
			return inv.misused("--revoked-jwt-form is %q: it must be array or object", *form)
		}
		if c.Password, err = readSecret("password", *passwordFile); err != nil {
			return inv.failed(err)
		}
	}
	tools, err := app.OpenCatalog(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	defer tools.Close()
	switch verb {
	case "put":
		err = tools.PutAccount(ctx, c)
	case "delete":
		err = tools.DeleteAccount(ctx, name)
	case "list":
		var all []authn.Account
		if all, err = tools.Accounts.Accounts(ctx); err == nil {
			err = printAccounts(stdout, all, *asJSON)
		}
	}
	if err != nil {
		return inv.failed(err)
	}
	return exitOK
}

// accountWords checks the words of an account command.
func accountWords(words []string) (verb, name string, err error) {
	if len(words) == 0 {
		return "", "", errors.New("say what to do: put NAME, list or delete NAME")
	}
	verb, words = words[0], words[1:]
	switch verb {
	case "put", "delete":
		if len(words) != 1 || words[0] == "" {
			return "", "", fmt.Errorf("%s takes the name of one account", verb)
		}
		return verb, words[0], nil
	case "list":
		if len(words) != 0 {
			return "", "", fmt.Errorf("list takes no argument, not %q", words[0])
		}
		return verb, "", nil
	}
	return "", "", fmt.Errorf("%q is none of put NAME, list and delete NAME", verb)
}

// readSecret reads a secret, what, from a file, from standard input for -, and is "" for no
// file. A newline at the end is not part of it.
func readSecret(what, path string) (string, error) {
	var b []byte
	var err error
	switch path {
	case "":
		return "", nil
	case "-":
		b, err = io.ReadAll(io.LimitReader(os.Stdin, 1<<16))
	default:
		b, err = os.ReadFile(path)
	}
	if err != nil {
		return "", fmt.Errorf("read the %s: %w", what, err)
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if secret == "" {
		return "", fmt.Errorf("read the %s: it is empty", what)
	}
	return secret, nil
}

// accountJSON is an account as --json shows it.
type accountJSON struct {
	Username       string   `json:"username"`
	Role           string   `json:"role"`
	Tenant         string   `json:"tenant"`
	ExtraTenants   []string `json:"extra_tenants,omitempty"`
	RevokedJWTForm string   `json:"revoked_jwt_form"`
}

func printAccounts(w io.Writer, all []authn.Account, asJSON bool) error {
	shown := make([]accountJSON, len(all))
	for i, a := range all {
		shown[i] = accountJSON{a.Username, a.Role, a.Tenant.Domain, a.ExtraTenants, "array"}
		if a.RevokedJWTObject {
			shown[i].RevokedJWTForm = "object"
		}
	}
	if asJSON {
		return writeJSON(w, shown)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NAME\tROLE\tTENANT\tEXTRA TENANTS\tREVOKED JWT FORM")
	for _, a := range shown {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", a.Username, a.Role, a.Tenant, strings.Join(a.ExtraTenants, ","), a.RevokedJWTForm)
	}
	return table.Flush()
}
