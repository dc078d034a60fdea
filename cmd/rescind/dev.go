package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// devStack is what rescind-dev tells of itself in dev.json.
type devStack struct {
	BaseURL         string   `json:"base_url"`
	OpsURL          string   `json:"ops_url"`
	DatabaseURL     string   `json:"database_url"`
	AMQPURL         string   `json:"amqp_url"`
	GatewayAMQPURL  string   `json:"gateway_amqp_url"`
	EtcdEndpoints   []string `json:"etcd_endpoints"`
	ClientID        string   `json:"client_id"`
	ClientSecret    string   `json:"client_secret"`
	AdminUser       string   `json:"admin_user"`
	AdminPassword   string   `json:"admin_password"`
	GatewayUser     string   `json:"gateway_user"`
	GatewayPassword string   `json:"gateway_password"`
	GatewayURLs     []string `json:"gateway_urls"`
	MasterKey       string   `json:"master_key"`
	PID             int      `json:"pid"`
}

const defaultDevJSON = ".rescind/dev.json"

func readDevStack(path string) (devStack, error) {
	var d devStack
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return d, fmt.Errorf("%s is not there: start rescind-dev in this folder, or name its file with --dev-json", path)
	case err != nil:
		return d, err
	}
	if err := json.Unmarshal(b, &d); err != nil {
		return d, fmt.Errorf("read %s: %w", path, err)
	}
	return d, nil
}
