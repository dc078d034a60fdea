DROP TABLE rescind.fleet_processes;
DROP TABLE rescind.gateways;
